// Billing's rows as stacked columns over time, with scales to draw them by. Pure.

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const OTHERS = "others";

/** The spans that can be looked at, in days, and how wide their columns are. */
export const SPANS = {
  "24h": { days: 1, unit: "hour", words: "24 hours" },
  "7d": { days: 7, unit: "day", words: "7 days" },
  "30d": { days: 30, unit: "day", words: "30 days" },
  "90d": { days: 90, unit: "day", words: "90 days" },
  "12m": { days: 365, unit: "month", words: "12 months" },
};

/** Return the start of a span that ends at `now` (ms since 1970): the beginning of its first column, UTC. */
export function startOf({ days, unit }, now) {
  if (unit === "hour") return Math.floor(now / HOUR) * HOUR - (days * 24 - 1) * HOUR;
  if (unit === "day") return Math.floor(now / DAY) * DAY - (days - 1) * DAY;
  const today = new Date(now);
  return Date.UTC(today.getUTCFullYear(), today.getUTCMonth() - 11, 1);
}

/** Return the names of all columns from `start` up to `now`, as billing names them. */
export function columnNames(unit, start, now) {
  const names = [];
  for (let at = start; at <= now; at = after(unit, at)) names.push(nameOf(unit, at));
  return names;
}

function after(unit, at) {
  if (unit !== "month") return at + (unit === "hour" ? HOUR : DAY);
  const date = new Date(at);
  return Date.UTC(date.getUTCFullYear(), date.getUTCMonth() + 1, 1);
}

function nameOf(unit, at) {
  const text = new Date(at).toISOString();
  if (unit === "month") return text.slice(0, 7);
  return unit === "day" ? text.slice(0, 10) : `${text.slice(0, 13)}:00:00Z`;
}

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/** Return a column's name as people read it: `14:00`, `3 Feb`, `Feb 2026`. */
export function shortName(unit, name) {
  const month = MONTHS[Number(name.slice(5, 7)) - 1];
  if (unit === "hour") return name.slice(11, 16);
  return unit === "day" ? `${Number(name.slice(8, 10))} ${month}` : `${month} ${name.slice(0, 4)}`;
}

/**
 * Return `{series, columns, most}`: names of the series, the largest first and at most `width` of them with the rest
 * as `others`; for each column its name, the value of each series, and the sum of them; and the largest sum. Series
 * are as large as their `weight`: stacks of the same rows by one weight have the same series in the same order.
 */
export function stack(rows, { unit, by, names, value, weight = value, width = 7 }) {
  const sums = new Map();
  const cells = new Map();
  for (const row of rows) {
    const amount = Math.max(0, value(row.totals));
    const series = row.key[by];
    const weighs = Math.max(0, weight(row.totals));
    if (weighs || amount) sums.set(series, (sums.get(series) ?? 0) + weighs);
    if (amount) cells.set(`${row.key[unit]}\n${series}`, amount);
  }
  const ranked = [...sums.keys()].sort((a, b) => sums.get(b) - sums.get(a) || (a < b ? -1 : 1));
  const own = ranked.length > width ? ranked.slice(0, width - 1) : ranked;
  const rest = ranked.slice(own.length);
  const columns = names.map((name) => {
    const at = (series) => cells.get(`${name}\n${series}`) ?? 0;
    const values = own.map(at);
    if (rest.length) values.push(rest.reduce((sum, series) => sum + at(series), 0));
    return { name, values, sum: values.reduce((a, b) => a + b, 0) };
  });
  const series = rest.length ? [...own, OTHERS] : own;
  return { series, columns, most: Math.max(0, ...columns.map(({ sum }) => sum)) };
}

/** Return round numbers from 0 to at least `most`, about `count` steps apart evenly. */
export function ticks(most, count = 4) {
  if (!(most > 0)) return [0];
  const rough = most / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999_999);
  const steps = Math.ceil(most / step - 1e-9);
  return Array.from({ length: steps + 1 }, (_, index) => Number((index * step).toPrecision(12)));
}

/** Return the currencies that rows have amounts in, in their order. */
export const currenciesOf = (rows) => [...new Set(rows.flatMap(({ totals }) => Object.keys(totals.amounts)))].sort();

const OPEN = new Set(["running", "awaiting_provider"]);

/** Return for each model how its generations ended up and its tokens, from rows by `provider`, `model` and `status`. */
export function byModel(rows) {
  const models = new Map();
  for (const { key, totals } of rows) {
    const name = `${key.provider}\n${key.model}`;
    const model = models.get(name) ?? { model: key.model, provider: key.provider, generations: 0, statuses: {}, counted: 0, reported: 0, drift: 0, unpriced: 0, open: 0 };
    models.set(name, model);
    model.generations += totals.generations;
    model.statuses[key.status] = (model.statuses[key.status] ?? 0) + totals.generations;
    model.counted += totals.counted_output;
    model.reported += totals.output;
    model.drift += totals.drift;
    model.unpriced += totals.unpriced;
    if (OPEN.has(key.status)) model.open += totals.generations;
  }
  return [...models.values()].sort((a, b) => b.generations - a.generations || (a.model < b.model ? -1 : 1));
}
