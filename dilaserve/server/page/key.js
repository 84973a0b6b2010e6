// The dialog that asks for the API key: one at a time, however many requests want it.

import { find } from "./dom.js";

let open = null;

/** The key that the user gives. `refused`: the last one was wrong. */
export function askForKey(refused) {
  open ??= ask(refused).finally(() => (open = null));
  return open;
}

function ask(refused) {
  const dialog = find("#key-dialog");
  const field = find("#key");
  if (refused) find("#key-why").textContent = "The server refused that key. Give another one.";
  field.value = "";
  dialog.showModal();
  field.focus();
  return new Promise((resolve) => {
    const used = (event) => {
      event.preventDefault();
      find("#key-form").removeEventListener("submit", used);
      dialog.removeEventListener("cancel", stay);
      dialog.close();
      resolve(field.value.trim());
    };
    const stay = (event) => event.preventDefault(); // nothing works without a key
    find("#key-form").addEventListener("submit", used);
    dialog.addEventListener("cancel", stay);
  });
}
