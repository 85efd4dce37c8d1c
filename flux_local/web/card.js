// One request among the pictures: on its way, done, or failed.

import { call, draw, events, fileUrl, get } from "./api.js";
import { el } from "./dom.js";

const LOOK_EVERY = 500; // milliseconds between looks at a request's progress
const LOOK_AGAIN = 5000; // and where the server did not answer
const STREAMS = 3; // at a time: a browser has six connections for all of a page, and progress and pictures want some

let streams = 0;

/** Whether anything is being drawn that ends with this page. */
export const streaming = () => streams > 0;

export class Card {
  /** `on`: what the page does when a picture is opened, a request is refused, or the card goes away. */
  constructor(prompt, count, ratio, on) {
    this.on = on;
    this.id = null;
    this.params = null; // as run; unknown while this page streams it
    this.ended = false;
    this.promising = false; // sent as a promise that the server has not made yet
    this.unwanted = false; // by then
    this.prompt = prompt || "(no prompt)";
    this.abort = new AbortController();
    this.pictures = Array.from({ length: count }, () => el("div", { className: "blank" }));
    for (const blank of this.pictures) blank.style.aspectRatio = ratio;
    this.note = el("p", { className: "note" });
    this.progress = el("progress", { max: 1, "aria-label": "Progress" });
    this.button = el("button", { type: "button", className: "quiet", textContent: "Cancel", onclick: () => this.stop() });
    this.frame = el("div", { className: "pictures" }, ...this.pictures);
    this.element = el("article", { className: "card running" }, this.frame, this.progress,
      el("p", { className: "prompt", textContent: this.prompt, title: prompt }), this.note, this.button);
  }

  /** Draws a request of this page's: streamed, the pictures shown as they come, or as a promise where many are. */
  async run(request) {
    this.say("sending …");
    try {
      if (streams < STREAMS) await this.#stream(request);
      else await this.#promise(request);
    } catch (error) {
      if (this.abort.signal.aborted) {
        this.fail("Cancelled.");
      } else if (this.id === null && error.status < 429) {
        this.leave(); // the form says what is wrong
        this.on.refused(error);
      } else {
        this.fail(error.message);
        if (error.status === 401) this.on.refused(error);
      }
    }
  }

  async #stream(request) {
    streams += 1;
    let whole = 0;
    try {
      const response = await draw(request, this.abort.signal);
      this.#known(response.headers.get("x-request-id"));
      this.watch();
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        this.show(event.index ?? 0, `data:image/${event.output_format};base64,${event.b64_json}`);
        if (event.type.endsWith(".completed")) whole += 1;
      }
    } finally {
      streams -= 1;
    }
    const entry = await get(`v1/images/requests/${this.id}`).catch(() => null);
    if (this.ended) return;
    if (entry && !entry.progress) {
      this.settle(entry);
    } else if (whole) {
      this.end("done");
      this.dismissable();
      this.say("The server has not stored it: it is here until you leave.");
    } else {
      throw new Error("The connection was cut off before the picture was finished.");
    }
  }

  async #promise(request) {
    const params = { ...request.params, stream: false, partial_images: 0 };
    this.promising = true;
    try {
      this.follow(await (await draw({ ...request, params }, null, { prefer: "respond-async" })).json());
    } finally {
      this.promising = false;
    }
    if (this.unwanted) await this.stop();
  }

  #known(id) {
    this.id = this.element.dataset.id = id;
    this.on.known(this);
  }

  /** Shows an entry of the history, and tells of its progress while it is not finished. */
  follow(entry) {
    this.#known(entry.id);
    this.params = entry.params;
    if (entry.progress) this.watch();
    else this.settle(entry);
  }

  /** Tells of the progress until the request has ended. */
  async watch() {
    while (!this.ended) {
      let pause = LOOK_EVERY;
      try {
        const entry = await get(`v1/images/requests/${this.id}`);
        if (this.ended) return;
        if (entry.progress) this.#tell(entry.progress);
        else if (!this.isStreaming()) this.settle(entry);
      } catch (error) {
        if (this.ended) return;
        pause = LOOK_AGAIN;
        if (!this.isStreaming() && [401, 404].includes(error.status)) this.fail(error.message);
        else if (!this.isStreaming()) this.say("The server does not answer; waiting for it.");
      }
      await new Promise((resolve) => setTimeout(resolve, pause));
    }
  }

  #tell({ step, steps, queue_position: ahead, seconds_left: left }) {
    this.progress.value = steps ? step / steps : 0;
    this.say(step ? `step ${step} of ${steps}` : ahead ? `${ahead} before it` : "about to begin",
      left >= 2 ? `${Math.round(left)} s left` : "");
  }

  isStreaming() {
    return this.params === null;
  }

  /** The final state of an entry. */
  settle(entry) {
    this.params = entry.params;
    if (entry.status !== "succeeded") {
      this.fail(entry.error?.message ?? "It failed.");
      return;
    }
    this.end("done");
    const { data, timings, flagged } = entry.response;
    const stored = data.filter((item) => item.url);
    if (stored.length === data.length) {
      this.pictures = [];
      this.frame.replaceChildren();
      stored.forEach((item, index) => this.show(index, fileUrl(item.url), item));
    }
    for (const blank of this.frame.querySelectorAll(".blank")) blank.remove();
    if (!this.frame.querySelector("button")) this.dismissable();
    const { ignored, prompt, prompt_2: longer } = entry.params;
    this.say(entry.params.delivered, `seed ${entry.params.seeds[0]}`, `${timings.total_s.toFixed(1)} s`,
      flagged ? `${flagged} left out by the safety checker` : "", stored.length < data.length ? "not stored" : "",
      ignored?.length ? `without effect: ${ignored.join(", ").replaceAll("_", " ")}` : "",
      data.some((item) => item.revised_prompt !== (longer ?? prompt)) ? "the prompt was too long and was cut" : "");
  }

  show(index, source, item = null) {
    const img = el("img", { src: source, alt: this.prompt });
    const picture = item
      ? el("button", { type: "button", className: "picture", onclick: () => this.on.open(this, item, source) }, img)
      : el("div", { className: "picture" }, img);
    if (this.pictures[index]) this.pictures[index].replaceWith(picture);
    else this.frame.append(picture);
    this.pictures[index] = picture;
  }

  fail(message) {
    const focused = document.activeElement === this.button;
    this.end("failed");
    this.frame.replaceChildren();
    this.say(message);
    this.dismissable();
    if (focused) this.button.focus();
  }

  end(state) {
    this.ended = true;
    this.element.className = `card ${state}`;
    this.note.setAttribute("role", "status"); // from here on what it says is said once
    this.progress.remove();
    this.button.remove();
  }

  dismissable() {
    this.button.textContent = "Remove";
    this.button.disabled = false;
    this.button.onclick = () => this.remove();
    this.element.append(this.button);
  }

  /** Ends a request that is under way: a stream with its connection, another by its id. */
  async stop() {
    this.button.disabled = true;
    if (this.promising) {
      this.unwanted = true;
      this.say("cancelling …");
      return;
    }
    if (this.isStreaming()) {
      this.abort.abort();
      return;
    }
    try {
      await call(`v1/images/requests/${this.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) {
        this.button.disabled = false;
        this.say(error.message);
        return;
      }
    }
    this.id = null;
    delete this.element.dataset.id;
    this.fail("Cancelled.");
  }

  /** Away with it, here and on the server; it stays where the server does not do so. */
  async remove() {
    try {
      if (this.id) await call(`v1/images/requests/${this.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) {
        this.say(`Not deleted: ${error.message}`);
        return;
      }
    }
    this.leave();
  }

  leave() {
    this.ended = true;
    this.element.remove();
    this.on.gone(this);
  }

  say(...parts) {
    const text = parts.filter(Boolean).join(" · ");
    if (this.note.textContent !== text) this.note.textContent = text;
  }
}
