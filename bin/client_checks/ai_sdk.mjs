// The default provider, which asks /v1/responses.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";

const model = createOpenAI({ baseURL: process.env.OPENAI_BASE_URL, apiKey: "none" })(process.env.MODEL);
console.log((await generateText({ model, prompt: "Reverse: lamu" })).text);
let text = "";
for await (const part of streamText({ model, prompt: "Reverse: lamu" }).textStream) text += part;
console.log(text);
