// The page: the form on one side, what was asked for on the other.

import { ApiError, call, get, key } from "./api.js";
import { Card, streaming } from "./card.js";
import { byId, el } from "./dom.js";
import { Form, Problem, streamed } from "./form.js";
import { Painter, png } from "./mask.js";

const STATE_EVERY = 5000; // milliseconds between looks at the server's state
const PAGE = 24; // requests of the history at a time
const KEPT_PROMPT = "flux-local prompt"; // over a reload
const READ = ["image/png", "image/jpeg", "image/webp"]; // by the server

const painter = new Painter(byId("mask"), byId("brush"), byId("ring"));
const cards = new Map(); // by request
let form = null;
let [loading, loaded] = [false, false];
let unready = new Problem("The server has not answered yet; this page asks again by itself.", null);
let image = null; // the File or Blob to start from
let viewed = null; // { card, item } in the viewer

// The server's state and key.

async function showState() {
  let text;
  try {
    const { model, device, precision } = await get("ready");
    text = `${model} on ${device}, ${precision}`;
    if (!loaded && unready.status !== 401) await load();
  } catch (error) {
    text = error instanceof ApiError ? error.message : "The server does not answer.";
  }
  if (byId("state").textContent !== text) byId("state").textContent = text;
}

async function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  byId("key-value").value = key.get();
  dialog.returnValue = "";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  if (dialog.returnValue !== "use") return;
  key.set(byId("key-value").value);
  location.reload();
}

// The form.

function problem(error) {
  const box = byId("problem");
  box.hidden = error === null;
  box.textContent = error?.message ?? "";
  form?.mark(error?.param ?? null);
  if (error?.status !== 401) return;
  byId("docs").hidden = true; // a link cannot show a key
  askForKey();
}

function ready() {
  if (form === null) problem(unready);
  return form !== null;
}

async function start(file) {
  if (!ready()) return;
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (bitmap === null) {
    problem(new Problem("This file cannot be read as a picture. Choose a PNG, JPEG or WebP.", null));
    return;
  }
  problem(null);
  image = READ.includes(file.type) ? file : await png(bitmap);
  URL.revokeObjectURL(byId("original").src);
  byId("original").src = URL.createObjectURL(image);
  painter.reset(bitmap.width, bitmap.height);
  byId("drop").hidden = true;
  byId("editor").hidden = false;
  form.show("edits");
}

function withoutImage() {
  image = null;
  URL.revokeObjectURL(byId("original").src);
  byId("original").removeAttribute("src");
  byId("file").value = "";
  byId("drop").hidden = false;
  byId("editor").hidden = true;
  form.show("generations");
}

async function submit() {
  if (!ready()) return;
  problem(null);
  let params, request;
  try {
    params = form.values();
    request = { params: streamed(params), image, mask: image && (await painter.png()) };
    // Painted over as it is seen: a browser may turn a picture by its metadata where the server does not, or the reverse.
    if (request.mask) request.image = await png(byId("original"), painter.canvas.width, painter.canvas.height);
  } catch (error) {
    problem(error);
    return;
  }
  const ratio = image ? painter.canvas.width / painter.canvas.height : ratioOf(params);
  const card = new Card(params.prompt, params.n ?? 1, ratio, actions);
  byId("gallery").prepend(card.element);
  byId("empty").hidden = true;
  card.element.scrollIntoView({ block: "nearest" });
  await card.run(request);
}

function ratioOf(params) {
  const [width, height] = (params.size ?? params.aspect_ratio ?? "1:1").split(/[x:]/i).map(Number);
  return width > 0 && height > 0 ? width / height : 1;
}

/** The request as a command line; a key and files are for the user to put in. */
function curl() {
  const params = form.values();
  const url = new URL(image ? "v1/images/edits" : "v1/images/generations", document.baseURI).href;
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const parts = [`curl ${url}`];
  if (key.get()) parts.push('-H "Authorization: Bearer $API_KEY"');
  if (image) {
    parts.push("-F image=@image.png", ...(painter.touched ? ["-F mask=@mask.png"] : []));
    for (const [name, value] of Object.entries(params)) {
      parts.push(`--form-string ${quoted(`${name}=${typeof value === "object" ? JSON.stringify(value) : value}`)}`);
    }
  } else {
    parts.push('-H "Content-Type: application/json"', `-d ${quoted(JSON.stringify(params))}`);
  }
  return parts.join(" \\\n  ");
}

// The pictures.

const actions = {
  open(card, item, source) {
    viewed = { card, item, source };
    const { params } = card;
    byId("viewed").src = source;
    byId("viewed").alt = params.prompt;
    byId("viewed-prompt").textContent = item.revised_prompt ?? params.prompt;
    const facts = {
      size: params.delivered, seed: item.seed, steps: params.steps, guidance: params.guidance, strength: params.strength,
      acceleration: params.acceleration === "none" ? null : params.acceleration, fast: params.go_fast ? "fp8" : null,
      "negative prompt": params.negative_prompt,
    };
    const shown = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
    byId("viewed-facts").replaceChildren(
      ...shown.map(([name, value]) => el("div", {}, el("dt", { textContent: name }), el("dd", { textContent: String(value) }))),
    );
    Object.assign(byId("download"), { href: source, download: `flux-${item.seed}.${source.split(".").pop()}` });
    byId("delete").textContent = card.pictures.length > 1 ? `Delete all ${card.pictures.length}` : "Delete";
    byId("viewer").showModal();
  },
  known: (card) => cards.set(card.id, card),
  refused: problem,
  gone(card) {
    cards.delete(card.id);
    byId("empty").hidden = byId("gallery").children.length > 0;
  },
};

async function showHistory(after) {
  const query = new URLSearchParams({ limit: PAGE, ...(after ? { after } : {}) });
  const { data, has_more: more } = await get(`v1/images/requests?${query}`);
  for (const entry of data.filter((found) => !cards.has(found.id))) {
    const [width, height] = entry.params.delivered.split("x").map(Number);
    const card = new Card(entry.params.prompt, entry.params.seeds.length, width / height, actions);
    cards.set(entry.id, card);
    byId("gallery").append(card.element);
    card.follow(entry);
  }
  byId("older").hidden = !more;
  byId("empty").hidden = byId("gallery").children.length > 0;
}

/** What comes after the last request of the gallery that the server still knows of. */
async function showOlder() {
  const shown = [...byId("gallery").children].map((card) => card.dataset.id).filter(Boolean);
  for (const id of shown.reverse()) {
    try {
      await showHistory(id);
      return;
    } catch (error) {
      if (error.status !== 404) throw error; // gone meanwhile: the one before it will do
    }
  }
  await showHistory();
}

// What the user does.

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  if (!event.repeat) submit();
});
byId("file").addEventListener("change", ({ target }) => target.files[0] && start(target.files[0]));
document.addEventListener("paste", ({ clipboardData }) => {
  // Office programs copy text in every form, as a picture too; a file's name comes as plain text alone.
  const isText = ["text/plain", "text/html"].every((type) => clipboardData.types.includes(type));
  if (isText || document.querySelector("dialog[open]")) return;
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) start(file);
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(name, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    byId("source").classList.toggle("over", over);
    const file = name === "drop" && event.dataTransfer.files[0];
    if (file) start(file);
  });
}
byId("undo-mask").onclick = () => painter.undo();
byId("clear-mask").onclick = () => painter.clear();
byId("remove-image").onclick = withoutImage;
byId("key").onclick = askForKey;
byId("curl").onclick = async ({ target }) => {
  if (!ready()) return;
  let line;
  try {
    line = curl();
  } catch (error) {
    problem(error);
    return;
  }
  try {
    await navigator.clipboard.writeText(line);
  } catch { // only what comes from this machine or over TLS may copy by itself
    byId("curl-line").value = line;
    byId("curl-dialog").showModal();
    byId("curl-line").select();
    return;
  }
  target.textContent = "Copied";
  setTimeout(() => (target.textContent = "Copy as curl"), 1500);
};
byId("close").onclick = () => byId("viewer").close();
byId("reuse").onclick = () => {
  const { params } = viewed.card;
  form.fill(params, viewed.item.seed);
  byId("viewer").close();
  const drawnOver = params.strength !== null && params.strength !== undefined;
  problem(drawnOver && !image ? new Problem("This was drawn from a picture. Add it to draw the same again.", null) : null);
};
byId("edit").onclick = async () => {
  byId("viewer").close();
  try {
    await start(await (await call(viewed.source)).blob());
  } catch (error) {
    problem(error);
  }
};
byId("delete").onclick = () => {
  byId("viewer").close();
  byId("gallery").focus();
  viewed.card.remove();
};

byId("older").onclick = () => showOlder().catch(problem);
window.addEventListener("beforeunload", (event) => {
  if (streaming()) event.preventDefault();
});

window.addEventListener("pagehide", () => sessionStorage.setItem(KEPT_PROMPT, byId("form").elements.prompt.value));

// The beginning.

/** The fields and the history; tried again when the server answers, if it did not. */
async function load() {
  if (loading) return;
  loading = true;
  try {
    if (form === null) {
      const { data } = await get("v1/models?schema=true");
      form = new Form(data[0].parameters, byId("form").elements.prompt, byId("main-fields"), byId("more-fields"));
      form.show("generations");
      problem(null);
    }
    await showHistory();
    loaded = true;
  } catch (error) {
    unready = error;
    problem(error);
  }
  loading = false;
}

byId("docs").hidden = key.get() !== ""; // a link cannot show the key
byId("form").elements.prompt.value ||= sessionStorage.getItem(KEPT_PROMPT) ?? "";
load();
showState();
setInterval(showState, STATE_EVERY);
