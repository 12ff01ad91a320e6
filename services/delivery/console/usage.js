// What billing says of a generation, asked for until it is settled.

const SETTLED = new Set(["matched", "drift", "provider_missing", "partial"]);
const PATIENCE = 10_000;

/** Whether billing's answer will not change by waiting a little. */
export const isSettled = (usage) => SETTLED.has(usage?.status);

/** Return milliseconds before the next look when `waited` ms have passed, or null to stop asking. */
export function nextLook(waited) {
  return waited >= PATIENCE ? null : Math.min(1_500, 150 + waited / 2);
}

/**
 * Looks up the usage of generations. `look(name)` returns billing's answer or throws; `onUsage(name, usage)` hears
 * each answer; `onSilence(name)` that billing did not answer at all. At most a few look-ups run at once.
 */
export class UsageWatch {
  #waiting = [];
  #running = new Set();

  constructor({ look, onUsage, onSilence, pause = (ms) => new Promise((done) => setTimeout(done, ms)), width = 4 }) {
    Object.assign(this, { look, onUsage, onSilence, pause, width });
  }

  /** Ask about a generation; asking about one that is waiting or running already changes nothing. */
  watch(name) {
    if (this.#running.has(name) || this.#waiting.includes(name)) return;
    this.#waiting.push(name);
    this.#next();
  }

  #next() {
    while (this.#running.size < this.width && this.#waiting.length > 0) {
      const name = this.#waiting.shift();
      this.#running.add(name);
      this.#follow(name).finally(() => {
        this.#running.delete(name);
        this.#next();
      });
    }
  }

  async #follow(name) {
    let heard = false;
    for (let waited = 0, delay = 0; delay !== null; delay = nextLook(waited)) {
      await this.pause(delay);
      waited += delay;
      const usage = await this.look(name).catch(() => null); // not there yet, or not reachable: look again
      if (!usage) continue;
      heard = true;
      this.onUsage(name, usage);
      if (isSettled(usage)) return;
    }
    if (!heard) this.onSilence(name);
  }
}
