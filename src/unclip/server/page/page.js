// The page: forms that post jobs, cards that show them, and a history. See docs/guides/serving.md for the API.

const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const PANEL = { generation: "generate", variation: "vary", decode: "vary", interpolation: "interpolate", edit: "edit" };
const FINAL = ["completed", "failed", "cancelled"];
const STAGES = { prior: ["Prior", 0, 0.1], decoder: ["Decoder", 0.1, 0.75], super_res: ["Super-resolution", 0.85, 0.15] };
const EXAMPLES = ["a red apple", "a smiling cat", "a yellow star", "a house with a garden"];
const MAX_SHOWN = 6, MAX_STREAMS = 3, MAX_PAST = 200, MAX_SIDE = 1024, MAX_FILE = 8e6;
const jobs = new Map(), cards = new Map(), streams = new Map();
let key = sessionStorage.getItem("unclip.key"), models = [], asking = null, pollTimer = null, past = read("unclip.past", []);

// ---- small helpers ----

function el(name, given = {}, ...children) {
  const made = document.createElement(name);
  for (const [field, value] of Object.entries(given)) {
    if (field.startsWith("on")) made.addEventListener(field.slice(2), value);
    else if (field in made && typeof value !== "string") made[field] = value;
    else made.setAttribute(field === "className" ? "class" : field, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}
function read(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
}
function write(name, value) {
  try { localStorage.setItem(name, JSON.stringify(value)); } catch { /* the browser keeps no data */ }
}
function say(text) { $("#said").textContent = text; }
function banner(text) { $("#banner").textContent = text ?? ""; $("#banner").hidden = !text; }
function slug(text) { return text.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 40) || "picture"; }
function here(url) { return url.slice(url.indexOf("/v1/files/") + 1); }
function isFinal(job) { return FINAL.includes(job.status); }

/** Fetch from this server. On 401, ask for a key and try again. */
async function ask(path, { method, json, form, signal } = {}) {
  for (;;) {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (json) headers["Content-Type"] = "application/json";
    const used = key;
    const answer = await fetch(path, { method: method ?? (json || form ? "POST" : "GET"), headers, signal, body: json ? JSON.stringify(json) : form });
    if (answer.ok) return answer;
    if (answer.status === 401) {
      if (used === key) await askKey(Boolean(used));
      continue;
    }
    const body = await answer.json().catch(() => ({}));
    throw new Error(body.error?.message ?? `The server answered with status ${answer.status}.`);
  }
}
const get = async (path, options) => (await ask(path, options)).json();

function askKey(wasWrong) {
  asking ??= new Promise((done) => {
    const dialog = $("#key"), form = $("form", dialog);
    $("h2", dialog).textContent = wasWrong ? "The key is wrong" : "This server needs a key";
    form.reset();
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      key = form.elements.key.value.trim();
      sessionStorage.setItem("unclip.key", key);
      asking = null;
      done();
    };
    dialog.showModal();
  });
  return asking;
}

// ---- pictures that a job starts from, kept in this browser so that its settings can be used again ----

const store = new Promise((done) => {
  try {
    const opening = indexedDB.open("unclip", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("inputs");
    opening.onsuccess = () => done(opening.result);
    opening.onerror = () => done(null);
  } catch { done(null); }
});
async function inputs(mode, act) {
  const base = await store;
  if (!base) return undefined;
  return new Promise((done) => {
    const request = act(base.transaction("inputs", mode).objectStore("inputs"));
    request.onsuccess = () => done(request.result);
    request.onerror = () => done(undefined);
  });
}
function remember(job, thumb) {
  const known = past.find((each) => each.id === job.id);
  const entry = { id: job.id, type: job.type, request: job.request, created_at: job.created_at, thumb: thumb ?? known?.thumb };
  past = [entry, ...past.filter((each) => each !== known)].sort((a, b) => b.created_at - a.created_at);
  for (const old of past.splice(MAX_PAST)) inputs("readwrite", (kept) => kept.delete(old.id));
  write("unclip.past", past);
}
async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob, { resizeWidth: 104, resizeHeight: 104, resizeQuality: "high" });
  const canvas = el("canvas", { width: 104, height: 104 });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.toDataURL("image/jpeg", 0.8);
}

// ---- jobs ----

function title(job) {
  const given = job.request;
  if (job.type === "interpolation") return given.input.join(" → ");
  if (given.from) return `${given.from} → ${given.to}`;
  return given.prompt || { variation: "Variations", decode: "Pictures of embeddings", edit: "Edit" }[job.type];
}
function facts(job) {
  const given = job.request, told = [];
  const seed = job.result?.data[0]?.seed ?? given.seed;
  if (seed != null) told.push(`seed ${seed}`);
  for (const name of ["steps", "guidance", "sampler", "strength"]) if (given[name] != null) told.push(`${name} ${given[name]}`);
  if (job.result) told.push(job.result.size.replace("x", " × "));
  return told.join(" · ");
}
function count(job) { return job.type === "interpolation" ? job.request.frames ?? 9 : job.request.n ?? 1; }

function setJob(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  cards.get(job.id)?.update(job);
  if (isFinal(job)) {
    streams.get(job.id)?.abort();
    streams.delete(job.id);
    if (before && !isFinal(before)) finished(job);
  }
  if (before?.status !== job.status && !$("#history").hidden) showPast();
}
async function finished(job) {
  say({ completed: `Finished: ${title(job)}`, cancelled: `Cancelled: ${title(job)}`, failed: `Failed: ${title(job)}` }[job.status]);
  if (job.status === "completed") {
    const first = job.result.data[0].url;
    remember(job, await fetch(here(first)).then((answer) => answer.blob()).then(thumbnail).catch(() => undefined));
  }
}
function showJob(job) {
  if (cards.has(job.id)) return cards.get(job.id);
  const card = new Card(job);
  cards.set(job.id, card);
  $(`#${PANEL[job.type]} .stage`).prepend(card.root);
  card.update(job);
  return card;
}
async function loadJobs() {
  const found = (await get("v1/jobs")).data;
  const counts = {};
  const shown = found.filter((job) => {
    if (job.status === "completed") counts[job.type] = (counts[job.type] ?? 0) + 1;
    return !isFinal(job) || (job.status === "completed" && counts[job.type] <= MAX_SHOWN);
  });
  for (const job of found.reverse()) setJob(job); // the oldest first, as those that are posted later
  for (const job of shown.reverse()) showJob(job);
  for (const [id, job] of jobs) if (!isFinal(job) && !found.some((each) => each.id === id)) setJob(await get(`v1/jobs/${id}`));
  pump();
}
/** Follow the oldest jobs by streams; browsers limit the connections, so ask for the others from time to time. */
function pump() {
  const open = [...jobs.values()].filter((job) => !isFinal(job)).sort((a, b) => a.created_at - b.created_at);
  for (const job of open.filter((each) => !streams.has(each.id)).slice(0, MAX_STREAMS - streams.size)) follow(job);
  clearTimeout(pollTimer);
  if (open.some((job) => !streams.has(job.id))) pollTimer = setTimeout(() => loadJobs().catch(pump), 2000);
}
async function follow(job) {
  const control = new AbortController();
  streams.set(job.id, control);
  try {
    const answer = await ask(`v1/jobs/${job.id}/events`, { signal: control.signal });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const [, name, data] = block.match(/^event: (.*)\ndata: (.*)$/) ?? [];
        if (name === "job") setJob(JSON.parse(data));
        else if (name === "progress") cards.get(job.id)?.progress(JSON.parse(data));
        else if (name === "preview") cards.get(job.id)?.preview(JSON.parse(data));
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") await new Promise((done) => setTimeout(done, 2000));
  }
  if (streams.get(job.id) === control) streams.delete(job.id);
  if (!isFinal(jobs.get(job.id))) {
    try { setJob(await get(`v1/jobs/${job.id}`)); } catch { await new Promise((done) => setTimeout(done, 2000)); }
  }
  pump();
}
async function removeJob(job) {
  const answer = await get(`v1/jobs/${job.id}`, { method: "DELETE" });
  if (!isFinal(job)) {
    setJob(answer);
    return;
  }
  jobs.delete(job.id);
  cards.get(job.id)?.root.remove();
  cards.delete(job.id);
  past = past.filter((each) => each.id !== job.id);
  write("unclip.past", past);
  inputs("readwrite", (kept) => kept.delete(job.id));
}

/** A job on its tab: pictures, progress and what can be done with it. */
class Card {
  constructor(job) {
    this.id = job.id;
    this.tiles = el("div");
    this.bar = el("progress", { max: "1", value: 0, "aria-label": `Progress of ${title(job)}` });
    this.words = el("span", { className: "quiet" });
    this.head = el("div", { className: "head" });
    this.status = el("div", { className: "bar" }, this.bar, this.words,
      el("button", { type: "button", onclick: () => this.act(() => removeJob(jobs.get(this.id))) }, "Cancel"));
    this.notes = el("div");
    this.actions = el("div", { className: "row" });
    this.root = el("article", { className: "job", "data-id": job.id, "aria-label": title(job) }, this.head, this.tiles, this.status, this.notes, this.actions);
    this.reset(job);
  }
  reset(job) {
    const number = count(job);
    this.tiles.className = job.type === "interpolation" ? "strip" : `grid ${["", "one", "two", "", "four"][number] ?? ""}`;
    this.tiles.replaceChildren(...Array.from({ length: number }, () => el("div", { className: "tile waiting" })));
  }
  async act(task) {
    try { await task(); } catch (error) { this.notes.replaceChildren(el("p", { className: "problem", role: "alert" }, error.message)); }
  }
  update(job) {
    if (this.state === `${job.status} ${job.position}` && isFinal(job)) return;
    this.state = `${job.status} ${job.position}`;
    this.head.replaceChildren(el("h2", { className: "title" }, title(job)), el("span", { className: "quiet" }, facts(job)));
    this.status.hidden = isFinal(job);
    if (job.status === "queued") {
      this.bar.removeAttribute("value");
      this.words.textContent = job.position ? `Waiting: ${job.position} before this one` : "Starting";
    }
    if (job.progress?.stage && !isFinal(job)) this.progress(job.progress);
    if (!isFinal(job)) return;
    const again = el("button", { type: "button", onclick: () => useSettings(job) }, "Use these settings");
    const remove = el("button", { type: "button", onclick: () => this.act(() => removeJob(job)) }, "Remove");
    this.actions.replaceChildren(again, remove);
    if (job.status === "completed") {
      this.notes.replaceChildren(...(job.result.warnings ?? []).map((text) => el("p", { className: "note" }, text)));
      this.show(job);
    } else {
      this.tiles.replaceChildren();
      const text = job.status === "cancelled" ? "Cancelled." : `Failed: ${job.error?.message ?? "unknown error"}`;
      this.notes.replaceChildren(el("p", { className: job.status === "failed" ? "problem" : "quiet" }, text));
    }
  }
  show(job) {
    const data = job.result.data;
    const tiles = data.map((item, place) => tile(job, place));
    this.tiles.className = job.type === "interpolation" ? "strip" : `grid ${["", "one", "two", "", "four"][data.length] ?? ""}`;
    this.tiles.replaceChildren(...tiles);
    this.film?.remove();
    if (job.result.film) {
      this.film = film(job);
      this.tiles.before(this.film);
      this.actions.prepend(el("a", { className: "button", href: here(job.result.film.url), download: `unclip-${slug(title(job))}.webp` }, "Download the film"));
    }
  }
  progress({ stage, step, num_steps: total }) {
    const [name, start, share] = STAGES[stage] ?? STAGES[stage.replace(/_\d+$/, "")] ?? [stage, 0.85, 0.15];
    this.bar.value = start + (share * step) / total;
    this.words.textContent = `${name} ${step} of ${total}`;
  }
  preview({ image_index: place, b64_json: data }) {
    const target = this.tiles.children[place];
    if (!target || isFinal(jobs.get(this.id))) return;
    target.className = "tile preview";
    target.replaceChildren(el("img", { src: `data:image/png;base64,${data}`, alt: "Preview" }));
  }
}
function tile(job, place) {
  const item = job.result.data[place];
  const image = el("img", { src: here(item.url), alt: `${title(job)}, picture ${place + 1}`, loading: "lazy" });
  image.addEventListener("error", async () => { // its URL has expired
    const fresh = await get(`v1/jobs/${job.id}`).catch(() => null);
    if (fresh?.result) { jobs.set(job.id, fresh); image.src = here(fresh.result.data[place].url); }
  }, { once: true });
  return el("div", { className: "tile made" }, el("button", { type: "button", "aria-label": `Open picture ${place + 1} of ${title(job)}`, onclick: () => view(job.id, place) }, image));
}
function film(job) {
  const frames = job.result.data.map((item) => here(item.url)), last = frames.length - 1;
  frames.forEach((url) => { new Image().src = url; });
  const image = el("img", { src: frames[0], alt: `Film: ${title(job)}` });
  const slider = el("input", { type: "range", min: "0", max: String(last), value: "0", "aria-label": "Frame" });
  const button = el("button", { type: "button" }, "Play");
  let place = 0, step = 1, timer = null;
  const show = () => { image.src = frames[place]; slider.value = place; };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
  const play = () => {
    button.textContent = "Pause";
    timer = setInterval(() => {
      if (!image.isConnected) return stop();
      if (place + step < 0 || place + step > last) step = -step;
      place += step;
      show();
    }, 140);
  };
  button.onclick = () => (timer ? stop() : play());
  slider.oninput = () => { stop(); place = Number(slider.value); show(); };
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  return el("div", { className: "film" }, el("div", { className: "tile made" }, image), el("div", { className: "bar" }, button, slider));
}

// ---- one picture, large ----

let viewed = null;
function view(id, place) {
  const job = jobs.get(id), data = job.result.data;
  viewed = { id, place: (place + data.length) % data.length };
  const item = data[viewed.place], dialog = $("#viewer"), url = here(item.url);
  $("img", dialog).src = url;
  $("img", dialog).alt = title(job);
  $(".title", dialog).textContent = title(job);
  const many = data.length > 1 ? ` · ${viewed.place + 1} of ${data.length}` : "";
  $(".quiet", dialog).textContent = facts({ ...job, result: { ...job.result, data: [item] } }) + many;
  const into = (panel, field) => async () => {
    const blob = await fetch(url).then((answer) => answer.blob());
    dialog.close();
    open(panel);
    await wells.get(`${panel} ${field}`).set(blob);
  };
  const turn = (step, sign, name) => data.length > 1 && el("button", { type: "button", "aria-label": name, onclick: () => view(id, viewed.place + step) }, sign);
  $(".row", dialog).replaceChildren(...[
    turn(-1, "←", "Previous picture"), turn(1, "→", "Next picture"),
    el("a", { className: "button", href: url, download: `unclip-${slug(title(job))}-${item.seed}.${job.result.output_format}` }, "Download"),
    el("button", { type: "button", onclick: into("vary", "image") }, "Vary"),
    el("button", { type: "button", onclick: into("edit", "image") }, "Edit"),
    el("button", { type: "button", onclick: into("interpolate", wells.get("interpolate start_picture").blob ? "end_picture" : "start_picture") }, "Interpolate"),
    el("button", { type: "button", onclick: () => { dialog.close(); useSettings(job, item.seed); } }, "Use these settings"),
  ].filter(Boolean));
  if (!dialog.open) dialog.showModal();
}
$("#viewer").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step) view(viewed.id, viewed.place + step);
});
for (const dialog of all("dialog:not(#key)")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

// ---- places for pictures ----

const wells = new Map();
class Well {
  constructor(root) {
    this.root = root;
    this.blob = null;
    const file = el("input", { type: "file", accept: "image/*", "aria-label": root.dataset.label });
    file.onchange = () => { if (file.files[0]) this.set(file.files[0]); file.value = ""; };
    const words = root.classList.contains("small") ? "Choose or drop a picture" : root.dataset.label;
    const label = el("label", {}, words, el("span", { className: "quiet" }, root.classList.contains("small") ? "" : "Choose a file, drop it here, or paste it"), file);
    this.shown = el("div", { className: "shown", hidden: true });
    this.take = el("button", { type: "button", className: "take", hidden: true, "aria-label": `Remove: ${root.dataset.label}`, onclick: () => { this.set(null); file.focus(); } }, "Remove");
    root.append(label, this.shown, this.take);
    if ("easel" in root.dataset) this.easel = new Easel(this.shown, root.closest("form"));
    root.addEventListener("dragover", () => root.classList.add("over"));
    root.addEventListener("dragleave", () => root.classList.remove("over"));
  }
  async set(blob) {
    let bitmap = null;
    try {
      bitmap = blob && (await createImageBitmap(blob));
    } catch {
      problem(this.root.closest("form"), "This file is not a picture that the browser can read.");
      return;
    }
    problem(this.root.closest("form"), "");
    this.blob = blob && (await fitted(blob, bitmap));
    this.shown.hidden = this.take.hidden = !blob;
    this.root.classList.toggle("full", Boolean(blob));
    if (this.easel) this.easel.open(blob && (await createImageBitmap(this.blob)));
    else this.shown.replaceChildren(...(blob ? [el("img", { src: URL.createObjectURL(this.blob), alt: this.root.dataset.label })] : []));
    this.root.dispatchEvent(new Event("change", { bubbles: true }));
  }
}
/** The file itself, or a smaller PNG of a large picture. */
async function fitted(blob, bitmap) {
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && blob.size < MAX_FILE && ["image/png", "image/jpeg", "image/webp"].includes(blob.type)) return blob;
  const canvas = el("canvas", { width: Math.max(1, Math.round(bitmap.width * scale)), height: Math.max(1, Math.round(bitmap.height * scale)) });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
function dataUrl(blob) {
  return new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(blob);
  });
}

/** A picture to paint on; the painted pixels become the transparent ones of the mask. */
class Easel {
  constructor(root, form) {
    this.form = form;
    this.base = el("canvas", { "aria-hidden": "true" });
    this.paint = el("canvas", { className: "paint", tabIndex: 0, role: "application", "aria-label": "Paint the part to change. Arrow keys move the brush, and the space bar paints." });
    root.append(this.base, this.paint);
    this.pen = this.paint.getContext("2d");
    this.last = null;
    this.paint.onpointerdown = (event) => { this.paint.setPointerCapture(event.pointerId); this.last = null; this.move(event); };
    this.paint.onpointermove = (event) => { if (event.buttons) this.move(event); };
    this.paint.onkeydown = (event) => this.key(event);
    const { brush, mask_file: file } = form.elements;
    brush.oninput = () => { $(".value", brush.parentElement).textContent = `${brush.value} %`; };
    brush.oninput();
    $("[data-do=clear]", form).onclick = () => this.clear();
    $("[data-do=invert]", form).onclick = () => this.invert();
    file.onchange = () => { if (file.files[0]) this.load(file.files[0]).catch(() => problem(form, "The mask is not a picture.")); file.value = ""; };
  }
  get radius() { return (this.form.elements.brush.value / 200) * Math.max(this.paint.width, this.paint.height); }
  open(bitmap) {
    $(".brush", this.form).hidden = !bitmap;
    if (!bitmap) return;
    for (const canvas of [this.base, this.paint]) [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    this.base.getContext("2d").drawImage(bitmap, 0, 0);
    this.cursor = { x: bitmap.width / 2, y: bitmap.height / 2 };
  }
  move(event) {
    const box = this.paint.getBoundingClientRect();
    const scale = Math.min(box.width / this.paint.width, box.height / this.paint.height); // object-fit: contain
    const left = (box.width - this.paint.width * scale) / 2, top = (box.height - this.paint.height * scale) / 2;
    this.stroke({ x: (event.clientX - box.left - left) / scale, y: (event.clientY - box.top - top) / scale });
  }
  stroke(to) {
    const { pen } = this, from = this.last ?? to;
    pen.globalCompositeOperation = this.form.elements.erase.checked ? "destination-out" : "source-over";
    pen.strokeStyle = getComputedStyle(document.documentElement).accentColor;
    pen.lineCap = pen.lineJoin = "round";
    pen.lineWidth = Math.max(1, 2 * this.radius);
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x, to.y + 0.01);
    pen.stroke();
    this.last = this.cursor = to;
  }
  key(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (step) {
      const far = Math.max(2, this.radius / 2);
      const clamp = (value, limit) => Math.max(0, Math.min(limit, value));
      this.cursor = { x: clamp(this.cursor.x + step[0] * far, this.paint.width), y: clamp(this.cursor.y + step[1] * far, this.paint.height) };
      if (event.shiftKey) this.stroke(this.cursor);
    } else if (event.key === " ") this.stroke(this.cursor);
    else return;
    this.last = this.cursor;
    event.preventDefault();
  }
  clear() { this.pen.clearRect(0, 0, this.paint.width, this.paint.height); }
  invert() {
    this.pen.globalCompositeOperation = "xor";
    this.pen.fillStyle = getComputedStyle(document.documentElement).accentColor;
    this.pen.fillRect(0, 0, this.paint.width, this.paint.height);
  }
  async load(file) {
    const { width, height } = this.paint, bitmap = await createImageBitmap(file);
    const canvas = el("canvas", { width, height }), pen = canvas.getContext("2d");
    pen.drawImage(bitmap, 0, 0, width, height);
    const pixels = pen.getImageData(0, 0, width, height), values = pixels.data;
    let isTransparent = false;
    for (let i = 3; i < values.length; i += 4) isTransparent ||= values[i] < 128;
    for (let i = 0; i < values.length; i += 4) {
      const marked = isTransparent ? values[i + 3] < 128 : values[i] > 127;
      values[i + 3] = marked ? 255 : 0;
    }
    pen.putImageData(pixels, 0, 0);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = getComputedStyle(document.documentElement).accentColor;
    pen.fillRect(0, 0, width, height);
    this.clear();
    this.pen.globalCompositeOperation = "source-over";
    this.pen.drawImage(canvas, 0, 0);
  }
  /** The mask as a PNG file; null when nothing is painted. */
  mask() {
    const { width, height } = this.paint, pixels = this.pen.getImageData(0, 0, width, height);
    let isPainted = false;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const marked = pixels.data[i + 3] > 127;
      isPainted ||= marked;
      pixels.data.fill(0, i, i + 4);
      pixels.data[i + 3] = marked ? 0 : 255;
    }
    if (!isPainted) return null;
    const canvas = el("canvas", { width, height });
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }
  get isTransparent() {
    const values = this.base.getContext("2d").getImageData(0, 0, this.base.width, this.base.height).data;
    return values.some((value, i) => i % 4 === 3 && value === 0);
  }
}

// ---- forms ----

function problem(form, text) {
  const place = $(".problem", form);
  place.textContent = text;
  place.hidden = !text;
}
const NUMBERS = ["n", "frames", "steps", "guidance", "prior_steps", "prior_guidance", "candidates", "super_res_steps"];
const COMMON = [...NUMBERS, "negative_prompt", "sampler", "size"];

/** The fields of a form as a job, and its pictures. Throws an Error with a message for the person. */
async function readForm(form) {
  const given = form.elements, type = form.dataset.type, panel = PANEL[type];
  const job = { type, partial_images: 3 }, pictures = {};
  for (const name of COMMON) {
    const value = given[name]?.value.trim();
    if (value) job[name] = NUMBERS.includes(name) ? Number(value) : value;
  }
  const seed = given.seed.value.trim();
  if (seed) job.seed = Number(seed);
  if (seed && !Number.isSafeInteger(job.seed)) throw new Error("The seed is too large for the page; use a smaller one.");
  if (models.length > 1) job.model = $("#models select").value;
  const image = wells.get(`${panel} image`)?.blob;
  if (type === "generation") job.prompt = given.prompt.value;
  if (type === "variation" || type === "edit") {
    if (!image) throw new Error("Choose a picture first.");
    pictures.image = image;
  }
  if (type === "edit" && given.mode.value === "words") {
    Object.assign(job, { from: given.from.value, to: given.to.value, strength: Number(given.strength.value) });
    if (!job.from.trim() || !job.to.trim()) throw new Error("Fill in both captions.");
  } else if (type === "edit") {
    const easel = wells.get("edit image").easel;
    job.prompt = given.prompt.value;
    if (!job.prompt.trim()) throw new Error("Describe the edited picture.");
    const mask = await easel.mask();
    if (mask) pictures.mask = mask;
    else if (!easel.isTransparent) throw new Error("Paint over the part to change first.");
  }
  if (type === "interpolation") {
    job.input = [];
    for (const end of ["start", "end"]) {
      const picture = wells.get(`interpolate ${end}_picture`).blob;
      if (!picture && !given[end].value.trim()) throw new Error(`Give a caption or a picture for the ${end}.`);
      if (picture) pictures[end] = picture;
      job.input.push(picture ? await dataUrl(picture) : given[end].value);
    }
  }
  return { job, pictures };
}
async function submit(form) {
  const button = $(".primary", form);
  problem(form, "");
  button.disabled = true;
  try {
    const { job, pictures } = await readForm(form);
    const body = new FormData();
    for (const [name, value] of Object.entries(job)) body.append(name, value);
    for (const name of ["image", "mask"]) if (pictures[name]) body.append(name, pictures[name], `${name}.png`);
    const posted = await get("v1/jobs", job.type === "interpolation" ? { json: job } : { form: body, method: "POST" });
    setJob(posted);
    const card = showJob(posted);
    remember(posted);
    if (Object.keys(pictures).length) inputs("readwrite", (kept) => kept.put(pictures, posted.id));
    say(`Started: ${title(posted)}`);
    if (matchMedia("(max-width: 56rem)").matches) card.root.scrollIntoView({ block: "start" });
    pump();
  } catch (error) {
    problem(form, error.message);
  } finally {
    button.disabled = false;
  }
}
function setupForm(form) {
  const type = form.dataset.type, more = $("#advanced").content.cloneNode(true);
  for (const field of all("[data-for]", more)) if (!field.dataset.for.split(" ").includes(type)) field.remove();
  if (type === "edit") $("[name=n]", more).value = 1;
  const button = $(".primary", form);
  button.before(more);
  form.append($("details", form)); // the button comes before the details
  button.after(el("p", { className: "problem", role: "alert", hidden: true }));
  for (const root of all(".well", form)) wells.set(`${PANEL[type]} ${root.dataset.name}`, new Well(root));
  form.addEventListener("submit", (event) => { event.preventDefault(); submit(form); });
  form.addEventListener("keydown", (event) => {
    const plain = event.target.matches("textarea") && !event.shiftKey && !event.isComposing;
    if (event.key === "Enter" && (plain || event.ctrlKey || event.metaKey)) { event.preventDefault(); form.requestSubmit(); }
  });
  $("[data-settings]", form).onchange = (event) => { if (event.target.files[0]) offerSettings(event.target.files[0]); event.target.value = ""; };
  if (type !== "edit") return;
  const modes = () => { for (const part of all("[data-mode]", form)) part.hidden = part.dataset.mode !== form.elements.mode.value; };
  for (const radio of form.elements.mode) radio.onchange = modes;
  const { strength } = form.elements;
  strength.oninput = () => { $(".value", strength.parentElement).textContent = strength.value; };
  strength.oninput();
  form.addEventListener("reset", () => setTimeout(() => { modes(); strength.oninput(); form.elements.brush.oninput(); }));
}
/** Fill the form of a job's type with its settings, and the pictures that this browser has kept. */
async function useSettings(job, seed) {
  const type = job.type === "decode" ? "variation" : job.type, given = job.request, panel = PANEL[type];
  const form = $(`#${panel} form`), fields = form.elements;
  form.reset();
  open(panel);
  for (const name of [...COMMON, "prompt", "from", "to", "strength"]) if (fields[name]) fields[name].value = given[name] ?? fields[name].defaultValue ?? "";
  for (const select of all("select", form)) if (select.selectedIndex < 0) select.selectedIndex = 0;
  fields.seed.value = seed ?? given.seed ?? job.result?.data[0]?.seed ?? "";
  if (["negative_prompt", "steps", "guidance", "sampler", "size", "prior_steps", "prior_guidance", "candidates", "super_res_steps"].some((name) => given[name] != null)) $("details", form).open = true;
  if (type === "edit") {
    form.elements.mode.value = given.from ? "words" : "paint";
    for (const part of all("[data-mode]", form)) part.hidden = part.dataset.mode !== form.elements.mode.value;
    fields.strength.oninput();
  }
  const kept = job.id ? await inputs("readonly", (base) => base.get(job.id)) : undefined;
  if (type === "interpolation") {
    for (const [i, end] of ["start", "end"].entries()) {
      fields[end].value = given.input?.[i] === "picture" ? "" : given.input?.[i] ?? "";
      await wells.get(`interpolate ${end}_picture`).set(kept?.[end] ?? null);
    }
  } else if (kept?.image) {
    await wells.get(`${panel} image`).set(kept.image);
    if (kept.mask) await wells.get("edit image").easel.load(kept.mask);
  }
  if (models.some((model) => model.id === given.model)) $("#models select").value = given.model;
  say("The settings are in the form.");
  ($("textarea", form) ?? $("input", form)).focus();
}

// ---- files from outside ----

async function offerSettings(file) {
  const dialog = $("#restore"), body = new FormData();
  body.append("image", file);
  const panel = current();
  const reference = () => {
    const into = ["vary", "edit"].includes(panel) ? panel : panel === "interpolate" ? null : "vary";
    if (into) { open(into); return wells.get(`${into} image`).set(file); }
    const end = wells.get("interpolate start_picture").blob ? "end" : "start";
    return wells.get(`interpolate ${end}_picture`).set(file);
  };
  const found = await get("v1/settings", { form: body }).catch(() => null);
  if (!found?.software) return reference();
  const shown = { model: found.model, ...found.fields };
  $("dl", dialog).replaceChildren(...Object.entries(shown).filter(([, value]) => value != null)
    .flatMap(([name, value]) => [el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, String(value))]));
  $("[data-do=apply]", dialog).onclick = async () => {
    dialog.close();
    const job = { type: found.type, request: { n: 1, ...found.fields, model: found.model } };
    await useSettings(job);
    if (found.type === "variation" || found.type === "edit") problem($(`#${PANEL[found.type]} form`), "A PNG does not hold the picture that it was made from. Choose that picture too.");
  };
  $("[data-do=reference]", dialog).onclick = () => { dialog.close(); reference(); };
  dialog.showModal();
}
const dragged = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => { if (dragged(event)) { event.preventDefault(); $("#drop").hidden = Boolean(event.target.closest?.(".well")); } });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("#drop").hidden = true; });
document.addEventListener("drop", (event) => {
  $("#drop").hidden = true;
  const file = event.dataTransfer?.files[0];
  if (!file) return;
  event.preventDefault();
  const root = event.target.closest?.(".well");
  root?.classList.remove("over");
  if (root) all(".well").includes(root) && wells.get(`${root.closest("section").id} ${root.dataset.name}`).set(file);
  else offerSettings(file);
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file) { event.preventDefault(); offerSettings(file); }
});

// ---- tabs ----

const tabs = all("[role=tab]");
function current() { return tabs.find((tab) => tab.getAttribute("aria-selected") === "true")?.getAttribute("aria-controls") ?? "generate"; }
function open(name) {
  const chosen = tabs.find((tab) => tab.getAttribute("aria-controls") === name && !tab.hidden) ?? tabs[0];
  for (const tab of tabs) {
    const is = tab === chosen;
    tab.setAttribute("aria-selected", String(is));
    tab.tabIndex = is ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !is;
  }
  chosen.scrollIntoView({ block: "nearest", inline: "center" });
  const opened = chosen.getAttribute("aria-controls");
  if (location.hash !== `#${opened}`) history.replaceState(null, "", `#${opened}`);
  if (opened === "history") showPast();
  if (opened === "concepts") thumbs.start(); else thumbs.stop();
}
for (const tab of tabs) {
  tab.type = "button";
  tab.onclick = () => { open(tab.getAttribute("aria-controls")); scrollTo(0, 0); };
  tab.onkeydown = (event) => {
    const shown = tabs.filter((each) => !each.hidden), place = shown.indexOf(tab);
    const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: shown.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = shown[(to + shown.length) % shown.length];
    open(next.getAttribute("aria-controls"));
    next.focus();
  };
}
addEventListener("hashchange", () => open(location.hash.slice(1)));

// ---- history ----

function showPast() {
  const ids = new Set(jobs.keys());
  const entries = [...[...jobs.values()].reverse(), ...past.filter((each) => !ids.has(each.id))].sort((a, b) => b.created_at - a.created_at);
  $("#past").replaceChildren(...entries.map(pastEntry));
  if (!entries.length) $("#past").append(el("li", { className: "quiet" }, "Nothing yet."));
}
function pastEntry(job) {
  const thumb = past.find((each) => each.id === job.id)?.thumb, isHere = job.status === "completed";
  const picture = isHere ? tile(job, 0) : el("div", { className: "tile" }, thumb ? el("img", { src: thumb, alt: "" }) : "");
  const when = new Date(job.created_at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  const state = job.status ? (isHere ? "" : `${job.status} · `) : "settings only · ";
  return el("li", {}, picture, el("div", { className: "words" },
    el("span", { className: "title" }, title(job)),
    el("span", { className: "quiet" }, `${state}${PANEL[job.type]} · ${when}`),
    el("div", { className: "row" },
      el("button", { type: "button", onclick: () => useSettings(job) }, "Use these settings"),
      job.status && el("button", { type: "button", onclick: async (event) => {
        try { await removeJob(job); showPast(); } catch (error) { event.target.after(el("p", { className: "problem" }, error.message)); }
      } }, isFinal(job) ? "Remove" : "Cancel") || null)));
}
$("#forget").onclick = () => {
  past = [];
  write("unclip.past", past);
  inputs("readwrite", (kept) => kept.clear());
  showPast();
};

// ---- concepts ----

const ofModel = () => (models.length > 1 ? `model=${encodeURIComponent($("#models select").value)}` : "");
/** Thumbnails of the concepts on the screen, a few at a time, as long as their tab is open. */
const thumbs = {
  waiting: [], num: 0, control: null,
  watch: new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      thumbs.waiting = thumbs.waiting.filter((each) => each !== target);
      if (isIntersecting) thumbs.waiting.push(target);
    }
    thumbs.next();
  }, { rootMargin: "100px" }),
  start() { this.control ??= new AbortController(); this.next(); },
  stop() { this.control?.abort(); this.control = null; },
  async next() {
    if (!this.control || this.num >= 4 || !this.waiting.length) return;
    const target = this.waiting.shift(), { signal } = this.control;
    this.num += 1;
    this.next();
    try {
      const blob = await (await ask(`v1/concepts/${target.dataset.id}/picture?${ofModel()}`, { signal })).blob();
      target.className = "tile made";
      target.replaceChildren(el("img", { src: URL.createObjectURL(blob), alt: "" }));
      this.watch.unobserve(target);
    } catch (error) {
      if (error.name === "AbortError") this.waiting.push(target);
      else target.className = "tile";
    }
    this.num -= 1;
    this.next();
  },
};
let asked = 0;
async function searchConcepts(offset = 0) {
  const number = ++asked, query = $("#concepts [name=query]").value.trim();
  const found = await get(`v1/concepts?limit=60&offset=${offset}&query=${encodeURIComponent(query)}&${ofModel()}`);
  if (number !== asked) return found;
  const list = $("#concept-list"), items = found.data.map((concept) => {
    const frame = el("span", { className: "tile waiting", "data-id": String(concept.id) });
    thumbs.watch.observe(frame);
    return el("li", {}, el("button", { type: "button", title: concept.other_names.slice(0, 8).join(", "), onclick: () => useConcept(concept.name) }, frame, concept.name));
  });
  if (offset) list.append(...items); else { thumbs.waiting = []; list.replaceChildren(...items); }
  $("#concept-count").textContent = found.total === 1 ? "1 concept" : `${found.total} concepts`;
  $("#more-concepts").hidden = list.children.length >= found.total;
  $("#more-concepts").onclick = () => searchConcepts(list.children.length);
  return found;
}
function useConcept(name) {
  const box = $("#generate [name=prompt]");
  open("generate");
  box.value = name;
  box.focus();
}
async function loadConcepts() {
  const found = await searchConcepts().catch(() => ({ total: 0, data: [] }));
  $("#tab-concepts").hidden = !found.total;
  const spread = [0.35, 0.45, 0.6, 0.65].map((share) => get(`v1/concepts?limit=1&offset=${Math.floor(share * found.total)}&${ofModel()}`));
  const names = found.total ? [...new Set((await Promise.all(spread)).map((one) => one.data[0].name))] : EXAMPLES;
  $("[data-examples]").replaceChildren(...names.map((name) => el("button", { type: "button", onclick: () => useConcept(name) }, name)));
}
let typing = null;
$("#concepts form").addEventListener("submit", (event) => event.preventDefault());
$("#concepts [name=query]").oninput = () => { clearTimeout(typing); typing = setTimeout(searchConcepts, 200); };

// ---- start ----

async function waitUntilReady() {
  for (;;) {
    const answer = await fetch("readyz").catch(() => null);
    if (answer?.ok) return banner("");
    const body = await answer?.json().catch(() => null);
    banner(body?.reason ? `Not ready: ${body.reason}.` : "The server does not answer.");
    await new Promise((done) => setTimeout(done, 1000));
  }
}
async function start() {
  all("form[data-type]").forEach(setupForm);
  const wanted = location.hash.slice(1) || "generate";
  open(wanted);
  waitUntilReady();
  models = (await get("v1/models")).data;
  const select = $("#models select");
  select.append(...models.map((model) => el("option", {}, model.id)));
  select.onchange = loadConcepts;
  $("#models").hidden = models.length < 2;
  await Promise.all([loadConcepts(), loadJobs()]);
  if (wanted === "concepts") open(wanted); // its tab is shown only now
  document.documentElement.dataset.ready = "true";
}
start().catch((error) => banner(error.message));
