// Two intervals and a chain of asynchronous appends, each with numbers of its own.
const fs = require("node:fs");
const folder = process.argv[2];
const log = folder + "/log";
fs.writeFileSync(log, "");
let fast = 0, slow = 0, chain = 0, stopping = false;

const intervals = [
  setInterval(() => fs.appendFileSync(log, `fast ${fast++}\n`), 3),
  setInterval(() => {
    fs.appendFileSync(log, `slow ${slow++}\n`);
    if (fs.existsSync(folder + "/stop")) stop();
  }, 20),
];

function next() {
  fs.appendFile(log, `chain ${chain}\n`, (error) => {
    if (error) throw error;
    chain++;
    if (stopping) fs.appendFileSync(log, `end fast ${fast}\nend slow ${slow}\nend chain ${chain}\n`);
    else setTimeout(next, 2);
  });
}

function stop() {
  stopping = true;
  intervals.forEach(clearInterval);
}

next();
