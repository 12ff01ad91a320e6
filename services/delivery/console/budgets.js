// Budgets and where they stand.
import { budgetBar } from "./chart.js";
import { byId, el } from "./dom.js";
import { number } from "./format.js";
import { decimal } from "./money.js";

const inUnit = (unit) => (amount) => (unit === "tokens" ? number(Number(amount)) : decimal(amount));

/** Say how a budget stands: `ok`, `soft` past its soft limit, `hard` at its hard one. */
export function standing({ spent, reserved, soft, hard }) {
  const used = Number(spent) + Number(reserved);
  if (hard !== null && used >= Number(hard)) return "hard";
  return soft !== null && used >= Number(soft) ? "soft" : "ok";
}

const WORDS = { ok: "", soft: "Past the soft limit", hard: "Used up" };

/** Show budgets as bars with their numbers. */
export function showBudgets(budgets) {
  byId("budgets").replaceChildren(...budgets.map(line));
  byId("no-budgets").hidden = budgets.length > 0;
}

function line(budget) {
  const say = inUnit(budget.unit);
  const state = standing(budget);
  const facts = [
    `${say(budget.spent)} spent`,
    `${say(budget.reserved)} reserved`,
    ...(budget.soft === null ? [] : [`soft ${say(budget.soft)}`]),
    ...(budget.hard === null ? ["no hard limit"] : [`${say(budget.left)} left of ${say(budget.hard)}`]),
  ].join(" · ");
  const drawing = {
    title: `Budget ${budget.name}`,
    description: `${facts}, in ${budget.unit}. ${WORDS[state]}`.trim(),
    spent: Number(budget.spent),
    reserved: Number(budget.reserved),
    soft: budget.soft === null ? null : Number(budget.soft),
    hard: budget.hard === null ? null : Number(budget.hard),
  };
  const scope = budget.key ? ` for key ${budget.key}` : "";
  return el(
    "li",
    { class: "budget", "data-state": state },
    el("div", { class: "budget-head" }, el("strong", {}, budget.name), el("span", { class: "muted" }, `${budget.unit} a ${budget.period}${scope}`), el("span", { class: "budget-state" }, WORDS[state])),
    budgetBar(drawing),
    el("p", { class: "small budget-facts" }, facts),
  );
}
