// What a JavaScript program does with the official client: everything once. Prints what it got as one JSON document.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = "flux-krea-mini";
const small = { model, prompt: "a large red star on a blue background", size: "128x128", steps: 4, seed: 7 };
const found = {};

found.models = (await client.models.list()).data.map((entry) => entry.id);

const made = await client.images.generate({ ...small, n: 2, response_format: "b64_json" });
found.made = made.data.map((item) => item.b64_json);
found.usage = made.usage;

const stored = await client.images.generate(small);
const answer = await fetch(stored.data[0].url);
found.fetched = Buffer.from(await answer.arrayBuffer()).toString("base64");

const image = await toFile(Buffer.from(found.made[0], "base64"), "star.png", { type: "image/png" });
const edited = await client.images.edit({ ...small, image, prompt: "a large red star on white", strength: 0.6, response_format: "b64_json" });
found.edited = edited.data[0].b64_json;

found.events = [];
const stream = await client.images.generate({ ...small, stream: true, partial_images: 2 });
for await (const event of stream) found.events.push([event.type, event.partial_image_index ?? null, event.b64_json]);

try {
  await client.images.generate({ ...small, steps: 0 });
} catch (error) {
  found.refused = [error.constructor.name, error.status, error.param, error.code];
}

const leaving = new AbortController();
const long = await client.images.generate({ ...small, steps: 100, size: "192x192", stream: true, partial_images: 3 }, { signal: leaving.signal });
found.left = 0;
for await (const event of long) {
  found.left += 1;
  leaving.abort();
}

console.log(JSON.stringify(found));
