// Classifies images with a model that onnxcomp made small, in the browser.

import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";

const SIDE = 28;
const TIMED_RUNS = 20;

const element = (id) => document.getElementById(id);
const picture = element("seen").getContext("2d", { willReadFrequently: true });
const kilobytes = (bytes) => `${Math.round(bytes / 1000)} kB`;

let facts;
let session;
let shown = null; // what was chosen last: an image, and the class of a sample

function problem(text) {
  element("problem").textContent = text;
  element("problem").hidden = !text;
}

/** Draws an image as the model wants it: 28 by 28, whole, in the middle. */
function draw(image) {
  picture.fillStyle = image.background;
  picture.fillRect(0, 0, SIDE, SIDE);
  picture.imageSmoothingQuality = "high";
  const scale = SIDE / Math.max(image.source.width, image.source.height);
  const [width, height] = [image.source.width * scale, image.source.height * scale];
  picture.drawImage(image.source, (SIDE - width) / 2, (SIDE - height) / 2, width, height);
}

/** The canvas as brightness from 0 to 1, row by row; what is seen becomes gray too. */
function pixels(invert) {
  const data = picture.getImageData(0, 0, SIDE, SIDE);
  const values = new Float32Array(SIDE * SIDE);
  for (let at = 0; at < values.length; at++) {
    const [red, green, blue] = data.data.subarray(4 * at, 4 * at + 3);
    const gray = Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
    const value = invert ? 255 - gray : gray;
    data.data.fill(value, 4 * at, 4 * at + 3);
    values[at] = value / 255;
  }
  picture.putImageData(data, 0, 0);
  return values;
}

/** The usual colour of an image's border: the model was trained on black ones, and what is missing is filled with it. */
function borderColour(source) {
  picture.fillStyle = "white"; // behind what is transparent
  picture.fillRect(0, 0, SIDE, SIDE);
  picture.drawImage(source, 0, 0, SIDE, SIDE);
  const { data } = picture.getImageData(0, 0, SIDE, SIDE);
  const places = Array.from({ length: SIDE * SIDE }, (_, at) => at).filter(
    (at) => !(at % SIDE) || at % SIDE === SIDE - 1 || at < SIDE || at >= SIDE * (SIDE - 1),
  );
  return [0, 1, 2].map((channel) => {
    const values = places.map((at) => data[4 * at + channel]).sort((one, other) => one - other);
    return values[values.length / 2]; // the median: clothes may reach the border
  });
}

function softmax(scores) {
  const highest = Math.max(...scores);
  const powers = Array.from(scores, (score) => Math.exp(score - highest));
  const sum = powers.reduce((one, other) => one + other);
  return powers.map((power) => power / sum);
}

async function timed(feed) {
  const times = [];
  let outputs;
  for (let run = 0; run < TIMED_RUNS; run++) {
    const start = performance.now();
    outputs = await session.run(feed);
    times.push(performance.now() - start);
  }
  times.sort((one, other) => one - other);
  return [outputs, times[TIMED_RUNS / 2]];
}

async function classify() {
  draw(shown);
  const tensor = new ort.Tensor("float32", pixels(element("invert").checked), [1, 1, SIDE, SIDE]);
  const now = shown;
  const [outputs, milliseconds] = await timed({ [session.inputNames[0]]: tensor });
  if (now === shown) show(outputs[session.outputNames[0]].data, milliseconds);
}

function show(scores, milliseconds) {
  const shares = softmax(scores);
  const best = shares.indexOf(Math.max(...shares));
  shares.forEach((share, index) => {
    const row = element("bars").rows[index];
    row.className = index === best ? "best" : "";
    row.dataset.score = scores[index];
    row.querySelector(".fill").style.width = `${100 * share}%`;
    row.querySelector(".number").textContent = `${(100 * share).toFixed(1)} %`;
  });
  element("verdict").textContent = `${facts.classes[best]}, ${(100 * shares[best]).toFixed(1)} %`;
  element("truth").textContent = shown.label ? `It is labelled: ${shown.label}` : "An image of your own";
  element("time").textContent = `${milliseconds.toFixed(1)} ms`;
  document.body.dataset.done = Number(document.body.dataset.done ?? 0) + 1;
}

async function choose(image, button) {
  problem("");
  shown = image;
  for (const each of element("samples").children) each.setAttribute("aria-pressed", String(each === button));
  element("invert").disabled = Boolean(button);
  element("invert").checked = image.isBright;
  await classify();
}

async function chooseFile() {
  const [file] = element("file").files;
  element("file").value = ""; // the same file can be chosen again
  if (!file) return;
  let source;
  try {
    source = await createImageBitmap(file);
  } catch {
    problem(`${file.name} cannot be read as an image; choose a PNG, JPEG or WebP.`);
    return;
  }
  const colour = borderColour(source);
  const isBright = colour.reduce((one, other) => one + other) > 3 * 127;
  await choose({ source, background: `rgb(${colour})`, isBright, label: null }, null);
}

function makeRow(name) {
  const row = element("bars").insertRow();
  row.innerHTML =
    '<th scope="row"></th><td><div><div class="track"><div class="fill"></div></div><span class="number">–</span></div></td>';
  row.firstChild.textContent = name;
}

async function makeSample({ file, label }) {
  const image = new Image(SIDE, SIDE);
  image.src = file;
  image.alt = label;
  const button = document.createElement("button");
  button.type = "button";
  button.title = label;
  button.setAttribute("aria-pressed", "false");
  button.append(image);
  element("samples").append(button);
  await image.decode();
  const source = await createImageBitmap(image); // in its own size: an element's width is that on the page
  const sample = { source, background: "black", isBright: false, label };
  button.addEventListener("click", () => choose(sample, button));
}

async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: the server answered ${response.status}; was the page built?`);
  return response;
}

async function start() {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./onnxruntime-web/", import.meta.url).href;
  facts = await (await fetched("demo.json")).json();
  facts.classes.forEach(makeRow);
  const samples = Promise.all(facts.samples.map(makeSample));
  const model = await (await fetched("model.onnx")).arrayBuffer();
  session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  await samples;
  element("size").textContent = kilobytes(model.byteLength);
  element("before").textContent = kilobytes(facts.originalBytes);
  element("runtime").textContent = facts.runtime;
  element("file").addEventListener("change", chooseFile);
  element("invert").addEventListener("change", classify);
  element("samples").lastChild.click();
}

window.addEventListener("unhandledrejection", (event) => problem(event.reason.message));

start().catch((error) => {
  element("verdict").textContent = "It does not run here.";
  problem(error.message);
});
