// The API key that the person entered: kept for this tab alone, sent in a header, never in an address.
import { byId } from "./dom.js";

const PLACE = "tailrace-key";

/** Return the headers that say who asks; none where no key is needed. */
export function credentials() {
  const key = globalThis.sessionStorage?.getItem(PLACE);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export const hasKey = () => "Authorization" in credentials();

/** Let the person enter a key; resolves when there is a new one. Without any it cannot be declined. */
export function askForKey() {
  const dialog = byId("key-dialog");
  const field = byId("key");
  return new Promise((done) => {
    byId("key-form").onsubmit = (submit) => {
      submit.preventDefault();
      const key = field.value.trim();
      if (!key) return;
      sessionStorage.setItem(PLACE, key);
      field.value = "";
      dialog.close();
      done();
    };
    dialog.oncancel = (cancel) => hasKey() || cancel.preventDefault();
    if (!dialog.open) dialog.showModal();
    field.focus();
  });
}
