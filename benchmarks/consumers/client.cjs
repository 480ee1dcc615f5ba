// The same as client.py for onnxruntime-web and onnxruntime-node: node client.cjs PACKAGE < cases > answers
// PACKAGE is its folder in node_modules. NaN goes out as null.
const fs = require("node:fs");
const path = require("node:path");

const folder = path.resolve(process.argv[2]);
const { name, version } = JSON.parse(fs.readFileSync(path.join(folder, "package.json"), "utf-8"));
const ort = require(require.resolve(name, { paths: [folder] })); // by its exports: `main` of some versions is not there
const isWeb = name === "onnxruntime-web";
if (isWeb) {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = path.join(folder, "dist") + path.sep;
}
ort.env.logLevel = "fatal";
const options = { executionProviders: [isWeb ? "wasm" : "cpu"], intraOpNumThreads: 1, interOpNumThreads: 1, logSeverityLevel: 4 };
const say = (line) => fs.writeSync(1, JSON.stringify(line) + "\n");

async function run(graph, images, [count, ...shape], batch) {
  const session = await ort.InferenceSession.create(isWeb ? fs.readFileSync(graph) : graph, options);
  const size = shape.reduce((a, b) => a * b);
  const logits = [];
  for (let at = 0; at < count; at += batch) {
    const data = images.subarray(at * size, (at + batch) * size);
    const answer = (await session.run({ input: new ort.Tensor("float32", data, [batch, ...shape]) })).logits;
    const classes = answer.data.length / batch;
    for (let row = 0; row < batch; row++) logits.push([...answer.data.slice(row * classes, (row + 1) * classes)]);
  }
  return logits;
}

(async () => {
  say({ version });
  for (const line of fs.readFileSync(0, "utf-8").split("\n").filter(Boolean)) {
    const { graph, images: file, shape } = JSON.parse(line);
    const bytes = fs.readFileSync(file);
    const images = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    for (const batch of [1, shape[0]]) {
      try {
        say({ graph, batch, logits: await run(graph, images, shape, batch) });
      } catch (error) {
        say({ graph, batch, error: typeof error === "number" ? "an exception of C++ without words" : String(error.message ?? error) });
      }
    }
  }
})();
