// The API key that the person entered: kept for this tab, sent in a header, never in an address. Other tabs of this
// service that are open get it from this one; nothing is written to disk.
import { byId } from "./dom.js";

const PLACE = "tailrace-key";
const PATIENCE = 300; // ms to wait for another tab's answer
const channel = globalThis.document ? new BroadcastChannel(PLACE) : null;

channel?.addEventListener("message", ({ data }) => {
  if (data.type === "ask" && hasKey()) channel.postMessage({ type: "key", key: sessionStorage.getItem(PLACE) });
  if (data.type === "changed") sessionStorage.setItem(PLACE, data.key);
});

/** Return the headers that say who asks; none where no key is needed. */
export function credentials() {
  const key = globalThis.sessionStorage?.getItem(PLACE);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export const hasKey = () => "Authorization" in credentials();

/** Take the key of another open tab where this one has none; resolves to whether there is one now. */
export function findKey() {
  if (hasKey()) return Promise.resolve(true);
  return new Promise((done) => {
    const take = ({ data }) => {
      if (data.type !== "key") return;
      sessionStorage.setItem(PLACE, data.key);
      settle();
    };
    const settle = () => {
      clearTimeout(timer);
      channel.removeEventListener("message", take);
      done(hasKey());
    };
    const timer = setTimeout(settle, PATIENCE);
    channel.addEventListener("message", take);
    channel.postMessage({ type: "ask" });
  });
}

/** Return why the service refuses a key, or "" when it takes it. */
async function reasonAgainst(key, url) {
  try {
    const answer = await fetch(url, { headers: { Authorization: `Bearer ${key}` } });
    return answer.status === 401 ? "This key is not valid here: it may be mistyped, expired or revoked." : "";
  } catch {
    return "The service cannot be reached at the moment: try again.";
  }
}

/**
 * Let the person enter a key that the service at `url` takes; resolves when there is one. Without any key it cannot be
 * declined.
 */
export function askForKey(url = "/v1/sessions?limit=1") {
  const dialog = byId("key-dialog");
  const field = byId("key");
  const fault = byId("key-fault");
  const button = byId("key-form").querySelector("button");
  return new Promise((done) => {
    byId("key-form").onsubmit = async (submit) => {
      submit.preventDefault();
      const key = field.value.trim();
      if (!key || button.disabled) return;
      button.disabled = true;
      fault.textContent = await reasonAgainst(key, url);
      button.disabled = false;
      field.toggleAttribute("aria-invalid", fault.textContent !== "");
      if (fault.textContent) {
        field.select();
        return;
      }
      sessionStorage.setItem(PLACE, key);
      channel?.postMessage({ type: "changed", key });
      field.value = "";
      dialog.close();
      done();
    };
    dialog.oncancel = (cancel) => hasKey() || cancel.preventDefault();
    if (!dialog.open) dialog.showModal();
    field.focus();
  });
}
