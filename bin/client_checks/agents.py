import os
import sys

sys.path.pop(0)  # this script has the name of the package
from agents import Agent, Runner, set_tracing_disabled

set_tracing_disabled(True)
print(Runner.run_sync(Agent("reverser", model=os.environ["MODEL"]), "Reverse: lamu").final_output)
