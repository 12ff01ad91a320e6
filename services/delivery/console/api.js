// Requests to delivery and billing. Every failure is a Problem (RFC 9457), also when nobody answered.
import { credentials } from "./key.js";

const NAME = /^[A-Za-z0-9_-]{1,64}$/;
const ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789";

/** An error with an answer that people can read. `status` is 0 when the service could not be reached. */
export class Problem extends Error {
  constructor({ status = 0, type = "", title = "", detail = "", errors = [] }) {
    super(detail || title);
    this.name = "Problem";
    this.status = status;
    this.title = title || `Error ${status}`;
    this.detail = detail;
    this.errors = errors;
    /** The stable end of the problem's type, for instance `not-found`. */
    this.slug = type.split(":").pop();
  }

  /** Read the problem that a response carries, whatever its body is. */
  static async of(response) {
    const text = await response.text().catch(() => "");
    let body = {};
    try {
      body = JSON.parse(text);
    } catch {
      // not JSON: a proxy's page; its status has to do
    }
    const known = typeof body === "object" && body !== null ? body : {};
    const type = known.type ?? "";
    return new Problem({ ...known, type, status: response.status, title: known.title || response.statusText });
  }
}

/** Ask, as whoever the key stands for, and return the answer as `read` takes it from the response. */
export async function request(url, options, read = (response) => response.json()) {
  let response;
  try {
    response = await fetch(url, { ...options, headers: { ...options?.headers, ...credentials() } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "No answer.", detail: "The service cannot be reached at the moment." });
  }
  if (!response.ok) throw await Problem.of(response);
  return response.status === 204 ? null : read(response);
}

const part = encodeURIComponent;

export const isSessionName = (name) => NAME.test(name);

/** Return a name that nobody else will draw; without look-alike characters, as it is read aloud and typed. */
export function drawName(prefix, length = 10) {
  const bytes = crypto.getRandomValues(new Uint8Array(length));
  return prefix + Array.from(bytes, (byte) => ALPHABET[byte % ALPHABET.length]).join("");
}

export const readConfig = () => request("/console/config.json");

export const listSessions = (after = null) =>
  request(`/v1/sessions?limit=30${after ? `&after=${part(after)}` : ""}`);

export const readSession = (session) => request(`/v1/sessions/${part(session)}`);

export const ask = (session, body, idempotencyKey) =>
  request(`/v1/sessions/${part(session)}/generations`, {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey },
    body: JSON.stringify(body),
  });

/** Return a ticket that opens a session's events for a minute. */
export const readTicket = (session) =>
  request("/v1/tickets", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ sessions: [session] }),
  }).then(({ ticket }) => ticket);

export const cancel = (session, generation) =>
  request(`/v1/sessions/${part(session)}/generations/${part(generation)}/cancel`, { method: "POST" });

export const readUsage = (billing, generation) =>
  request(`${billing.replace(/\/$/, "")}/v1/usage/generations/${part(generation)}`);

/** Return the address of a session's events: after a cursor, or from the start of what the log keeps. */
export const eventsUrl = (session, cursor) =>
  `/v1/sessions/${part(session)}/events?${cursor ? `after=${part(cursor)}` : "from=start"}`;
