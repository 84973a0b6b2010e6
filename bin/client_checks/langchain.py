import os

from langchain_openai import ChatOpenAI

chat = ChatOpenAI(model=os.environ["MODEL"])
print(chat.invoke("Reverse: lamu").content)
print("".join(chunk.content for chunk in chat.stream("Reverse: lamu")))
