// node greedy.mjs MODEL.gguf COUNT ID ID ...: the greedy continuation, as token ids in JSON
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
const [file, count, ...ids] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 256, threads: 1});
const sequence = context.getSequence();
const tokens = [];
for await (const token of sequence.evaluate(ids.map(Number), {temperature: 0})) {
    tokens.push(token);
    if (tokens.length >= Number(count)) break;
}
console.log(JSON.stringify(tokens));
process.exit(0);
