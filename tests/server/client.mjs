// Calls a server through OpenAI's Node client, and prints what it got as JSON.
// Arguments: the folder of npm's packages, the server's address, the address of a server whose queue is full.
import { createRequire } from "node:module";

const [packages, url, full] = process.argv.slice(2);
const require = createRequire(`${packages}/`);
const { default: OpenAI, toFile } = require("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const type = { type: "image/png" };
const files = JSON.parse(await new Response(process.stdin).text());
const file = (name) => toFile(Buffer.from(files[name], "base64"), `${name}.png`, type);
const prompt = "a cat", b64 = { response_format: "b64_json" };
const found = {};

async function events(stream) {
  const all = [];
  for await (const event of await stream) all.push(event);
  return all;
}
async function refusal(call) {
  try {
    await call;
    return null;
  } catch (error) {
    return { name: error.constructor.name, status: error.status, param: error.param, code: error.code, type: error.type };
  }
}

found.generation = await client.images.generate({ prompt, ...b64, n: 2, seed: 5 });
found.url = await client.images.generate({ prompt, seed: 5 });
found.bytes = Buffer.from(await (await fetch(found.url.data[0].url)).arrayBuffer()).toString("base64");
found.masked = await client.images.edit({ image: await file("red"), mask: await file("mask"), prompt, ...b64 });
found.own_alpha = await client.images.edit({ image: await file("holed"), prompt, ...b64 });
found.list = await client.images.edit({ image: [await file("red")], mask: await file("mask"), prompt, ...b64 });
const many = await Promise.all(Array.from({ length: 17 }, () => file("red")));
found.two = await client.images.edit({ image: many.slice(0, 2), prompt, response_format: "b64_json" });
found.many = await refusal(client.images.edit({ image: many, prompt }));
found.variation = await client.images.createVariation({ image: await file("red"), n: 2, ...b64 });
found.stream = await events(client.images.generate({ prompt, stream: true, partial_images: 2, seed: 5 }));
found.edit_stream = await events(client.images.edit({ image: await file("holed"), prompt, stream: true, partial_images: 1 }));
found.embedding = await client.embeddings.create({ model: "tiny", input: prompt });
found.models = (await client.models.list()).data;
found.size = await refusal(client.images.generate({ prompt, size: "huge" }));
found.steps = await refusal(client.images.generate({ prompt, steps: 0 }));
found.mask = await refusal(client.images.edit({ image: await file("red"), mask: await file("small"), prompt }));
found.model = await refusal(client.images.generate({ prompt, model: "sdxl" }));

const busy = new OpenAI({ baseURL: `${full}/v1`, apiKey: "any", maxRetries: 0 });
found.full = await refusal(busy.images.generate({ prompt }));
const patient = new OpenAI({ baseURL: `${full}/v1`, apiKey: "any", maxRetries: 5 });
const waited = patient.images.generate({ prompt });
await fetch(`${full}/free`, { method: "POST" });
found.retried = await waited;
console.log(JSON.stringify(found));
