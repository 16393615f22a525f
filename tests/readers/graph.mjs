// Reads a .gexf or .graphml file with graphology and prints it as JSON.
import { readFileSync } from "fs";
import { createRequire } from "module";
import { join } from "path";

const [modules, file] = process.argv.slice(2);
const require = createRequire(join(modules, "package.json"));
const { MultiDirectedGraph } = require("graphology");
const kind = file.endsWith(".gexf") ? "graphology-gexf" : "graphology-graphml";
const graph = require(kind).parse(MultiDirectedGraph, readFileSync(file, "utf8"));
console.log(JSON.stringify(graph.export()));
