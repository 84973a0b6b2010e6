import os
import sys

sys.path.pop(0)  # this script has the name of the package
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

model = OpenAILike(
    model=os.environ["MODEL"], api_base=os.environ["OPENAI_BASE_URL"], api_key="none", is_chat_model=True
)
said = [ChatMessage(role="user", content="Reverse: lamu")]
print(model.chat(said).message.content)
print("".join(chunk.delta for chunk in model.stream_chat(said)))
