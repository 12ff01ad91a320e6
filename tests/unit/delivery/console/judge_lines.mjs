// For each line, a JSON list of [type, epoch, seq], prints the verdicts: lets the rule be compared with its twin.
import { createInterface } from "node:readline";
import { BEGINNING, judge } from "../../../../services/delivery/console/log.js";

for await (const line of createInterface({ input: process.stdin })) {
  let position = BEGINNING;
  const verdicts = JSON.parse(line).map(([type, epoch, seq]) => {
    const [next, verdict] = judge(position, type, epoch, seq);
    position = next;
    return verdict;
  });
  process.stdout.write(`${JSON.stringify(verdicts)}\n`);
}
