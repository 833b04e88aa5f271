// node chat.mjs MODEL.gguf COUNT QUESTION ...: a chat with the GGUF's own template, as JSON, an object for each question
import {JinjaTemplateChatWrapper, LlamaLogLevel, getLlama} from "node-llama-cpp";
const [file, count, ...questions] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const template = model.fileInfo.metadata.tokenizer.chat_template;
if (!template) throw new Error("the GGUF has no chat template");
const wrapper = new JinjaTemplateChatWrapper({template, tokenizer: model.tokenizer});
// Two threads that wait for each other take many times as long on a machine that does other work.
const context = await model.createContext({contextSize: 1024, threads: 1});
const chatHistory = [];
const turns = [];
for (const question of questions) {
    const answer = {type: "model", response: []};
    chatHistory.push({type: "user", text: question}, answer);
    const prompt = wrapper.generateContextState({chatHistory}).contextText.tokenize(model.tokenizer);
    const sequence = context.getSequence();
    const tokens = [];
    let ended = false;
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        ended = model.isEogToken(token);
        if (ended) break;
        tokens.push(token);
        if (tokens.length >= Number(count)) break;
    }
    sequence.dispose();
    const text = model.detokenize(tokens);
    answer.response.push(text);
    turns.push({question, prompt, tokens, text, ended});
}
console.log(JSON.stringify(turns));
process.exit(0);
