// The usage page: puts its parts together and holds what is chosen.
import { readConfig } from "./api.js";
import { showBudgets } from "./budgets.js";
import { byId, el, perFrame, setText } from "./dom.js";
import { showAgreement, showCharts, showPeriod, showTiles } from "./figures.js";
import { number } from "./format.js";
import { askForKey, findKey } from "./key.js";
import { LiveTotals } from "./live.js";
import { amountLines, Billing } from "./money.js";
import { columnNames, SPANS, startOf } from "./series.js";
import { Statements } from "./statement.js";

const REFRESH = 60_000; // ms between looks while the page is seen
const DIMENSIONS = ["model", "key", "provider", "tenant", "status"];
const LIVE_WORDS = { connecting: "Connecting", live: "Live", lost: "Lost · trying again", refused: "Refused" };

let billing = null;
let live = null;
let view = null; // what the charts show
let asked = 0; // questions so far: only the newest answer is shown

/** Ask for the chosen time and show it. */
async function load() {
  const number = ++asked;
  const chosen = SPANS[byId("span").value];
  const by = byId("by").value;
  const now = Date.now();
  const start = startOf(chosen, now);
  const from = new Date(start).toISOString().replace(".000", "");
  byId("usage").setAttribute("aria-busy", "true");
  try {
    const [rows, whole, settled, budgets] = await Promise.all([
      billing.usage({ from, group_by: `${chosen.unit},${by}` }),
      billing.usage({ from }),
      billing.usage({ from, group_by: "provider,model,status" }),
      billing.budgets(),
    ]);
    if (number !== asked) return;
    view = { ...rows, by, unit: chosen.unit, names: columnNames(chosen.unit, start, now) };
    showAll(whole.rows[0].totals, settled, budgets, chosen);
  } catch (problem) {
    if (number === asked) complain(problem);
  } finally {
    if (number === asked) byId("usage").removeAttribute("aria-busy");
  }
}

function showAll(totals, settled, budgets, chosen) {
  byId("problem").hidden = true;
  byId("loading").hidden = true;
  for (const id of ["figures", "budgets-panel", "statements"]) byId(id).hidden = false;
  setText(byId("period-title"), `Last ${chosen.words}`);
  byId("nothing").hidden = totals.generations > 0;
  byId("cut").hidden = view.complete && settled.complete;
  showPeriod(totals, sumsByStatus(settled.rows));
  showCharts(view);
  showAgreement(settled.rows);
  showBudgets(budgets);
  setText(byId("announcer"), `Usage of the last ${chosen.words} is shown`);
}

function sumsByStatus(rows) {
  const sums = new Map();
  for (const { key, totals } of rows) sums.set(key.status, (sums.get(key.status) ?? 0) + totals.generations);
  return [...sums].map(([status, generations]) => ({ key: { status }, totals: { generations } }));
}

function follow() {
  live?.close();
  live = new LiveTotals(billing.liveUrl, { totals: showLive, status: showLiveState });
  live.open();
}

function showLive({ totals, running }) {
  byId("live").hidden = false;
  showTiles(byId("live-tiles"), [
    { name: "Running now", value: number(running.generations), note: `${number(running.counted_output)} tokens so far` },
    { name: "Generations", value: number(totals.generations), note: "started today, UTC" },
    { name: "Output counted", value: number(totals.counted_output), note: "tokens" },
    { name: "Spend", value: amountLines(totals.amounts), note: "settled" },
  ]);
}

function showLiveState(kind) {
  byId("live-state").dataset.kind = { lost: "waiting" }[kind] ?? kind;
  setText(byId("live-state"), LIVE_WORDS[kind]);
}

/** Show a problem; one of credentials can be mended with another key. What was shown stays. */
function complain(problem) {
  if (!("status" in problem)) throw problem;
  const refused = problem.status === 401;
  const away = problem.status === 0 || problem.status >= 500;
  byId("loading").hidden = true;
  setText(byId("problem-title"), away ? "Billing does not answer." : `${problem.title.replace(/\.$/, "")}.`);
  setText(byId("problem-detail"), away ? "What it knows is not lost: try again in a moment." : problem.detail);
  setText(byId("problem-code"), problem.status ? `${problem.status} ${problem.slug}`.trim() : "");
  const button = byId("problem-action");
  setText(button, refused ? "Enter a key" : "Try again");
  button.onclick = refused ? changeKey : again;
  byId("problem").hidden = false;
}

function again() {
  byId("problem").hidden = true;
  follow();
  return load();
}

async function changeKey() {
  await askForKey(billing.checkUrl);
  await again();
}

/** Take the choice from the address, as far as it says something that can be chosen. */
function readChoice() {
  const said = new URLSearchParams(location.search);
  byId("span").replaceChildren(...Object.entries(SPANS).map(([name, { words }]) => el("option", { value: name }, words)));
  byId("span").value = said.get("span") in SPANS ? said.get("span") : "30d";
  byId("by").value = DIMENSIONS.includes(said.get("by")) ? said.get("by") : "model";
}

function choose() {
  const said = new URLSearchParams({ span: byId("span").value, by: byId("by").value });
  history.replaceState(null, "", `?${said}`);
  load();
}

function listen() {
  byId("choices").addEventListener("change", choose);
  byId("choices").addEventListener("submit", (submit) => submit.preventDefault());
  byId("refresh").addEventListener("click", again);
  byId("change-key").addEventListener("click", changeKey);
  const redraw = perFrame(() => view && showCharts(view));
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  });
  document.addEventListener("visibilitychange", () => document.hidden || load());
  setInterval(() => document.hidden || load(), REFRESH);
}

async function start() {
  readChoice();
  const config = await readConfig();
  byId("change-key").hidden = !config.credentials;
  if (!config.billing) {
    setText(byId("loading"), "Delivery does not know where billing is: set TAILRACE_DELIVERY_BILLING_URL.");
    byId("choices").hidden = true;
    return;
  }
  billing = new Billing(config.billing);
  if (config.credentials && !(await findKey())) await askForKey(billing.checkUrl);
  new Statements({ billing, complain, now: Date.now() });
  listen();
  follow();
  await load();
}

await start().catch(complain);
