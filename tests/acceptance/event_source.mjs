// Reads a URL with the npm package `eventsource` and prints one line of JSON for whatever happens.
//
//     node event_source.mjs URL      (NODE_PATH is no use to modules: run it in the folder of node_modules)

import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const require = createRequire(pathToFileURL(process.cwd() + '/'));
const { EventSource } = await import(pathToFileURL(require.resolve('eventsource')).href);
const say = (what) => process.stdout.write(JSON.stringify(what) + '\n');

const source = new EventSource(process.argv[2]);
source.onopen = () => say({ kind: 'open' });
source.onmessage = (e) => say({ kind: 'message', id: e.lastEventId, data: e.data });
source.onerror = (e) => {
  say({ kind: 'error', state: source.readyState, code: e.code });
  if (source.readyState === 2) process.exit(0);
};
for (const name of ['bye', 'gap']) {
  source.addEventListener(name, (e) => say({ kind: name, id: e.lastEventId, data: e.data }));
}
