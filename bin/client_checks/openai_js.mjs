import OpenAI from "openai";

const client = new OpenAI();
const asked = { model: process.env.MODEL, messages: [{ role: "user", content: "Reverse: lamu" }] };
console.log((await client.chat.completions.create(asked)).choices[0].message.content);
let text = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  text += chunk.choices[0]?.delta?.content ?? "";
}
console.log(text);
