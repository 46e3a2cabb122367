// Runs a model with onnxruntime-web in Node, as a browser would: the WebAssembly build, one thread.
//
//   node run.mjs
//
// It runs in a folder with the files that processes.py tells of; "job.json" also names onnxruntime-web's folder.
// ONNX Runtime prints its profile to standard output: WebAssembly has no files.

import { closeSync, openSync, readFileSync, readSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const REFUSED = 3;
const AT_ONCE = 1 << 30; // Node reads and writes less than 2 GiB at once

// ONNX element type -> [onnxruntime-web's name, array class].
const TYPES = new Map([
  [1, ["float32", Float32Array]],
  [2, ["uint8", Uint8Array]],
  [3, ["int8", Int8Array]],
  [4, ["uint16", Uint16Array]],
  [5, ["int16", Int16Array]],
  [6, ["int32", Int32Array]],
  [7, ["int64", BigInt64Array]],
  [9, ["bool", Uint8Array]],
  [10, ["float16", globalThis.Float16Array ?? Uint16Array]],
  [11, ["float64", Float64Array]],
  [12, ["uint32", Uint32Array]],
  [13, ["uint64", BigUint64Array]],
]);
const NUMBERS = new Map([...TYPES].map(([number, [name]]) => [name, number]));

/** Reads a file of tensors piece by piece: all feeds at once may not fit into memory. */
class Reader {
  constructor(path) {
    this.file = openSync(path, "r");
  }

  bytes(count) {
    const buffer = Buffer.from(new ArrayBuffer(count)); // one of its own: arrays of 8 bytes must be aligned
    for (let done = 0; done < count; ) {
      const read = readSync(this.file, buffer, done, Math.min(count - done, AT_ONCE), null);
      if (!read) throw new Error("the file of the feeds is cut short");
      done += read;
    }
    return buffer;
  }

  u32() {
    return this.bytes(4).readUInt32LE();
  }

  u64() {
    return Number(this.bytes(8).readBigUInt64LE());
  }

  tensor(ort) {
    const name = this.bytes(this.u32()).toString("utf8");
    const [type, Values] = TYPES.get(this.u32());
    const sizes = Array.from({ length: this.u32() }, () => this.u64());
    return [name, new ort.Tensor(type, new Values(this.bytes(this.u64()).buffer), sizes)];
  }

  run(ort) {
    return Object.fromEntries(Array.from({ length: this.u32() }, () => this.tensor(ort)));
  }
}

function write(file, bytes) {
  for (let done = 0; done < bytes.length; ) done += writeSync(file, bytes, done, Math.min(bytes.length - done, AT_ONCE));
}

function u32(...values) {
  return Buffer.from(Uint32Array.from(values).buffer);
}

function u64(...values) {
  return Buffer.from(BigUint64Array.from(values, BigInt).buffer);
}

function writeTensor(file, name, tensor) {
  const number = NUMBERS.get(tensor.type);
  if (number === undefined) throw new Error(`${name}: an output of the type ${tensor.type} cannot be handed over`);
  const text = Buffer.from(name, "utf8");
  const data = Buffer.from(tensor.data.buffer, tensor.data.byteOffset, tensor.data.byteLength);
  write(file, Buffer.concat([u32(text.length), text, u32(number, tensor.dims.length), u64(...tensor.dims)]));
  write(file, u64(data.length));
  write(file, data);
}

async function runAll(ort, job) {
  const session = await ort.InferenceSession.create(readFileSync(job.model), {
    executionProviders: ["wasm"],
    enableProfiling: true,
    extra: job.config,
    externalData: job.externalData.map((name) => ({ path: name, data: readFileSync(join(job.folder, name)) })),
  });
  const names = job.outputs ?? session.outputNames;
  const feeds = new Reader("feeds");
  const file = openSync("results", "w");
  const runs = feeds.u32();
  write(file, u32(runs));
  for (let run = 0; run < runs; run++) {
    const outputs = await session.run(feeds.run(ort), names);
    write(file, u32(names.length));
    for (const name of names) writeTensor(file, name, outputs[name]);
  }
  closeSync(file);
  session.endProfiling();
}

// Node would print where it happened and its own version after the message.
process.on("uncaughtException", (error) => {
  writeSync(2, `\n${error}\n`);
  process.exit(1);
});

const job = JSON.parse(readFileSync("job.json", "utf8"));
const ort = await import(pathToFileURL(join(job.runtime, "ort.wasm.min.mjs")).href);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
try {
  await runAll(ort, job);
} catch (error) {
  if (error instanceof WebAssembly.RuntimeError || !(error instanceof Error)) throw error; // a crash, no refusal
  writeFileSync("refusal", error.message);
  process.exitCode = REFUSED;
}
