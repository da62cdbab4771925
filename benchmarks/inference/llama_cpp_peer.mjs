// The peer of `make bench-generation`: llama.cpp through its binding for Node, on the CPU.
// node llama_cpp_peer.mjs MODULE MODEL THREADS TOKENS REPETITIONS PROMPT_IDS...
// Prints a line of JSON: token ids, seconds of each text, and the process's peak before and after the model was loaded.
import fs from "node:fs";
import {pathToFileURL} from "node:url";

const [module, modelPath, threads, tokens, repetitions, ...prompt] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(module));

function peakBytes() {
    return Number(/VmHWM:\s+(\d+)/.exec(fs.readFileSync("/proc/self/status", "utf8"))[1]) * 1024;
}

const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: Number(threads)});
const emptyBytes = peakBytes();
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 512, batchSize: 64, threads: Number(threads)});
const sequence = context.getSequence();
const seconds = [];
let ids = [];
for (let turn = 0; turn < Number(repetitions); turn++) {
    await sequence.clearHistory();
    ids = [];
    const started = performance.now();
    for await (const token of sequence.evaluate(prompt.map(Number), {temperature: 0, yieldEogToken: true})) {
        ids.push(token);
        if (ids.length === Number(tokens)) break;
    }
    seconds.push((performance.now() - started) / 1000);
}
console.log(JSON.stringify({ids, seconds, empty_bytes: emptyBytes, peak_bytes: peakBytes()}));
process.exit(0);
