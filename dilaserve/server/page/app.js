// Starts the page.

import { startCharts } from "./charts.js";
import { find } from "./dom.js";
import { describeModel, startPlayground } from "./playground.js";
import { watch } from "./server.js";

const here = new URL(".", document.baseURI);
if (location.pathname !== here.pathname) window.history.replaceState(null, "", here); // so that links stay on the page

startPlayground();
startCharts();
watch(({ model, version }) => {
  find("#model").textContent = `${model.name}, ${size(model.parameters)} parameters`;
  find("#version").textContent = version;
  document.title = `${model.name} on DiLaServe`;
  describeModel(model);
});

function size(parameters) {
  const [unit, name] = [[1e9, " billion"], [1e6, " million"], [1, ""]].find(([least]) => parameters >= least) ?? [1, ""];
  return `${(parameters / unit).toFixed(parameters >= 1e6 ? 1 : 0)}${name}`;
}
