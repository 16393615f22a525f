// What of d3 the page uses.
export { select, selectAll } from "d3-selection";
export { zoom, zoomIdentity } from "d3-zoom";
