// One request among the pictures: on its way, done, or failed.

import { ApiError, call, draw, events, fileUrl, get } from "./api.js";
import { el } from "./dom.js";

const LOOK_EVERY = 500; // milliseconds between looks at a request's progress

export class Card {
  /** `on`: what the page does when a picture is opened, or the card is through with or goes away. */
  constructor(prompt, count, ratio, on) {
    this.on = on;
    this.id = null;
    this.params = null;
    this.ended = false;
    this.abort = new AbortController();
    this.pictures = Array.from({ length: count }, () => el("div", { className: "blank" }));
    for (const blank of this.pictures) blank.style.aspectRatio = ratio;
    this.note = el("p", { className: "note", role: "status" });
    this.progress = el("progress", { max: 1 });
    this.cancel = el("button", { type: "button", className: "quiet", textContent: "Cancel", onclick: () => this.stop() });
    this.frame = el("div", { className: "pictures" }, ...this.pictures);
    this.element = el("article", { className: "card running" }, this.frame, this.progress,
      el("p", { className: "prompt", textContent: prompt || "(no prompt)", title: prompt }), this.note, this.cancel);
  }

  /** Draws a request of this page's, showing the pictures as they come. */
  async run(request) {
    this.say("sending …");
    try {
      const response = await draw(request, this.abort.signal);
      this.id = response.headers.get("x-request-id");
      this.watch();
      for await (const event of events(response)) {
        if (event.error) throw new ApiError(0, event.error);
        this.show(event.index ?? 0, `data:image/${event.output_format};base64,${event.b64_json}`);
      }
      await this.finish();
    } catch (error) {
      const cancelled = this.abort.signal.aborted;
      this.fail(cancelled ? "Cancelled." : error.message);
      if (!cancelled) this.on.refused(error);
      if (!this.id && error.status < 429) this.remove(); // the form says what is wrong
    }
  }

  /** Shows an entry of the history, and follows it while it is not finished. */
  async follow(entry) {
    this.id = entry.id;
    this.params = entry.params;
    if (!["queued", "running"].includes(entry.status)) return this.settle(entry);
    return this.watch();
  }

  /** Tells of the progress until the request has ended. */
  async watch() {
    while (!this.ended) {
      const entry = await get(`v1/images/requests/${this.id}`).catch(() => null);
      if (this.ended) return;
      if (entry?.progress) {
        const { step, steps, queue_position: ahead, seconds_left: left } = entry.progress;
        this.progress.value = steps ? step / steps : 0;
        this.say(step ? `step ${step} of ${steps}` : ahead ? `${ahead} before it` : "about to begin",
          left >= 2 ? `${Math.round(left)} s left` : "");
      } else if (entry && !this.isStreaming()) {
        return this.settle(entry);
      }
      await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY));
    }
  }

  isStreaming() {
    return this.params === null;
  }

  async finish() {
    this.settle(await get(`v1/images/requests/${this.id}`));
  }

  /** The final state of an entry. */
  settle(entry) {
    this.params = entry.params;
    const data = entry.response?.data ?? [];
    if (entry.status !== "succeeded") return this.fail(entry.error?.message ?? "It failed.");
    this.end("done");
    const stored = data.filter((item) => item.url);
    if (stored.length) {
      this.pictures = [];
      this.frame.replaceChildren();
      stored.forEach((item, index) => this.show(index, fileUrl(item.url), item));
    } else if (this.frame.querySelector(".blank")) {
      this.frame.replaceChildren();
    }
    const { timings, flagged } = entry.response ?? {};
    this.say(`${entry.params.delivered}`, `seed ${entry.params.seeds[0]}`, timings ? `${timings.total_s.toFixed(1)} s` : "",
      flagged ? `${flagged} left out by the safety checker` : "", stored.length || data.length === 0 ? "" : "not stored");
    return undefined;
  }

  show(index, source, item = null) {
    const img = el("img", { src: source, alt: this.element.querySelector(".prompt").textContent });
    const picture = item
      ? el("button", { type: "button", className: "picture", onclick: () => this.on.open(this, item, source) }, img)
      : el("div", { className: "picture" }, img);
    if (this.pictures[index]) this.pictures[index].replaceWith(picture);
    else this.frame.append(picture);
    this.pictures[index] = picture;
  }

  fail(message) {
    this.end("failed");
    this.frame.replaceChildren();
    this.say(message);
    this.cancel.textContent = "Dismiss";
    this.cancel.onclick = () => this.remove();
    this.element.append(this.cancel);
  }

  end(state) {
    this.ended = true;
    this.element.className = `card ${state}`;
    this.progress.remove();
    this.cancel.remove();
  }

  /** Ends a request that is under way: a stream with its connection, another by its id. */
  stop() {
    if (this.isStreaming()) this.abort.abort();
    else call(`v1/images/requests/${this.id}`, { method: "DELETE" }).then(() => this.fail("Cancelled."), (e) => this.say(e.message));
  }

  /** Away with it, here and on the server. */
  async remove() {
    if (this.id) await call(`v1/images/requests/${this.id}`, { method: "DELETE" }).catch(() => null);
    this.element.remove();
    this.on.gone(this);
  }

  say(...parts) {
    this.note.textContent = parts.filter(Boolean).join(" · ");
  }
}
