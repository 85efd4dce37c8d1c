// The server's API as the page uses it. Knows nothing of the page.

const KEY = "flux-local key";

export class ApiError extends Error {
  constructor(status, error, retryAfter) {
    super((error?.message ?? `The server answered ${status}.`) + (retryAfter ? ` (Retry-After: ${retryAfter} s)` : ""));
    this.status = status;
    this.param = error?.param ?? null;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value.trim()),
};

/** What fetch and streams throw where nothing answers, in words that say what to do. */
export function broken(error) {
  if (!(error instanceof TypeError)) throw error;
  throw new Error("The connection to the server broke. Try again when it answers.");
}

/** A response that is good; everything else is thrown: as an ApiError, or an Error where nothing answered. */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  const response = await fetch(new URL(path, document.baseURI), { ...options, headers }).catch(broken);
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw new ApiError(response.status, body.error, response.headers.get("retry-after"));
  }
  return response;
}

export const get = async (path) => (await call(path)).json();

/** A request for pictures, as JSON, or as a form where there is an image. */
export function draw({ params, image, mask }, signal, extra = {}) {
  if (!image) {
    const headers = { "content-type": "application/json", ...extra };
    return call("v1/images/generations", { method: "POST", headers, body: JSON.stringify(params), signal });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(params)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  form.append("image", image, image.name ?? "image.png");
  if (mask) form.append("mask", mask, "mask.png");
  return call("v1/images/edits", { method: "POST", headers: extra, body: form, signal });
}

/** The data of a response's server-sent events, as they come. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read().catch(broken);
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

/** A stored picture's URL where this page came from, whatever address the answer names. */
export const fileUrl = (url) => new URL(`v1/images/files/${url.split("/").pop()}`, document.baseURI).href;
