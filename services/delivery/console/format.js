// Values as people read them. Pure.

const NUMBER = new Intl.NumberFormat("en");

export const STATE_WORDS = {
  queued: "Queued",
  running: "Running",
  cancelling: "Cancelling",
  completed: "Completed",
  failed: "Failed",
  cancelled: "Cancelled",
  interrupted: "Interrupted",
};

export const BILLING_WORDS = {
  running: "Counting",
  matched: "Matched",
  drift: "Drift",
  awaiting_provider: "Awaiting provider",
  provider_missing: "Not reported",
  partial: "Partial",
};

export const number = (value) => NUMBER.format(value ?? 0);

/** `80 ms`, `1.24 s`, `12.3 s`, `2 min 5 s` */
export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1_000)} ms`;
  if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Shorten a cursor in its middle: its end is what moves. */
export const shortCursor = (cursor) => (cursor.length <= 16 ? cursor : `${cursor.slice(0, 4)}…${cursor.slice(-10)}`);

/** `just now`, `5 min ago`, `3 h ago`, `2 d ago`; both in seconds since 1970 */
export function ago(then, now) {
  const passed = Math.max(0, now - then);
  if (passed < 60) return "just now";
  if (passed < 3_600) return `${Math.floor(passed / 60)} min ago`;
  if (passed < 86_400) return `${Math.floor(passed / 3_600)} h ago`;
  return `${Math.floor(passed / 86_400)} d ago`;
}

/** `in 12 · out 345`, from a count or a usage; missing numbers are left out. */
export function tokenPair(input, output) {
  const shown = [];
  if (input) shown.push(`${number(input)} in`);
  shown.push(`${number(output)} out`);
  return shown.join(" · ");
}

/** Output tokens per second between the first and the last delta, or null while there is too little to say. */
export function rate({ tokens, firstAt, lastAt }) {
  const span = lastAt - firstAt;
  return span > 0.2 && tokens > 4 ? tokens / span : null;
}

/** Lay out a tool call's arguments where they are complete JSON; leave them as they are while they arrive. */
export function layout(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
