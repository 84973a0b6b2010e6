import os
import sys

sys.path.pop(0)  # this script has the name of the package
import instructor
from openai import OpenAI
from pydantic import BaseModel


class Answer(BaseModel):
    word: str


client = instructor.from_openai(OpenAI(), mode=instructor.Mode.JSON)
said = [{"role": "user", "content": "Reverse: lamu"}]
print(client.chat.completions.create(model=os.environ["MODEL"], messages=said, response_model=Answer).word)
