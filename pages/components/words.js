// The texts beside a figure: its charts' headings, and the legends, whose lines can be hidden. Plotly measures
// each of them, which takes as long as drawing the lines does, and no key reaches its legends.
const SVG = "http://www.w3.org/2000/svg"
const DASHES = { dash: "7 4", dot: "2 3", dashdot: "7 3 2 3" }
// Between a plot's edge and the words above it, in pixels.
const NEAR = 3

function element(kind, attributes, ...inner) {
  const made = document.createElement(kind)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...inner)
  return made
}

function shape(kind, attributes, ...inner) {
  const made = document.createElementNS(SVG, kind)
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value)
  made.append(...inner)
  return made
}

// Names are escaped for Plotly, which reads some tags in them.
function plain(text) {
  return text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&")
}

// How the lines of a legend's entry look in the chart.
function swatch({ type, mode, stackgroup, fillcolor, line = {}, marker = {} }) {
  const parts = []
  if (type === "bar" || stackgroup) {
    const fill = fillcolor ?? marker.color
    if (marker.pattern?.shape === "/") {
      parts.push(shape("path", { d: "M3 7L10 0M4 10L14 0M9 10L19 0M14 10L19 5", stroke: fill, opacity: 0.6 }))
    } else parts.push(shape("rect", { x: 3, width: 16, height: 10, fill, stroke: "currentColor", "stroke-opacity": 0.25 }))
  } else if (mode === "markers") {
    const d = marker.symbol === "x" ? "M7 1L15 9M15 1L7 9" : "M11 1L15 5L11 9L7 5Z"
    parts.push(shape("path", { d, stroke: marker.color, "stroke-width": 2, fill: "none" }))
  } else {
    const dashes = DASHES[line.dash] ?? "none"
    parts.push(shape("path", { d: "M0 5H22", stroke: line.color, "stroke-width": 2, "stroke-dasharray": dashes }))
  }
  return shape("svg", { width: 22, height: 10, "aria-hidden": "true" }, ...parts)
}

class Words {
  // `place` is the element to stand in, as large as the figure; `changed` is called when the reader hides lines.
  constructor(place, changed) {
    this.place = place
    this.changed = changed
    this.hidden = new Set()
    this.legends = []
    this.headings = []
  }

  // Draw the words of a figure and take them out of it; what the reader has hidden is hidden in it.
  take(figure, view, narrow) {
    const { layout, data } = figure
    const { annotations = [], margin, height } = layout
    const revision = layout.legend?.uirevision ?? view
    if (revision !== this.revision) this.hidden.clear()
    this.revision = revision
    this.groups = data.map((trace, number) => trace.legendgroup ?? String(number))
    const legends = Object.entries(layout).filter(([name]) => /^legend\d*$/.test(name))
    const looks = data.map(({ name, showlegend, line, marker, fillcolor }) => [name, showlegend, line, marker?.color, fillcolor])
    const around = [annotations, margin, height, layout.yaxis?.range, layout.showlegend, legends]
    const written = JSON.stringify([narrow, this.groups, looks, around])
    if (written !== this.written) {
      this.written = written
      this.place.replaceChildren()
      this.headings = []
      for (const annotation of annotations) this.write(annotation, layout)
      this.legends = narrow || layout.showlegend === false ? [] : this.lists(figure)
    }
    this.mark()
    for (const [number, group] of this.groups.entries()) if (this.hidden.has(group)) data[number].visible = "legendonly"
    for (const { list, outside, below } of this.legends) {
      // However many lines an outer legend takes: the plot keeps its height below it, and leaves its own above it.
      if (!outside) continue
      const more = list.offsetHeight + below - (outside === "above" ? margin.t : 0)
      if (outside === "under") margin.b = Math.max(margin.b, more)
      else if (more > 0) {
        margin.t += more
        layout.height += more
      }
    }
    for (const [name] of legends) delete layout[name]
    delete layout.annotations
    layout.showlegend = false
  }

  // All of them stand at so many pixels from the lower edge, which does not move when the upper one does.
  write({ text, x, y, yref, yanchor, bgcolor, font }, layout) {
    const { margin, height } = layout
    const [low, high] = yref === "paper" ? [0, 1] : layout.yaxis.range
    const above = margin.b + ((y - low) / (high - low)) * (height - margin.t - margin.b)
    const isHeading = text.startsWith("<b>")
    const words = element("div", { class: isHeading ? "gm-heading" : "gm-label" }, plain(text.replace(/<\/?b>/g, "")))
    if (isHeading) this.headings.push(words.textContent)
    words.style.left = `calc(${margin.l}px + ${x} * (100% - ${margin.l + margin.r}px))`
    words.style.bottom = `${yanchor === "bottom" ? above + NEAR : above}px`
    if (yanchor !== "bottom") words.style.transform = "translateY(50%)"
    if (bgcolor) words.style.background = bgcolor
    if (font?.size) words.style.fontSize = `${font.size}px`
    this.place.append(words)
  }

  // Which lines are in which legend, those of a group as one.
  lists({ data, layout }) {
    const legends = {}
    for (const [number, trace] of data.entries()) {
      if (trace.showlegend === false || !trace.name) continue
      const entries = (legends[trace.legend ?? "legend"] ??= new Map())
      if (!entries.has(this.groups[number])) entries.set(this.groups[number], trace)
    }
    return Object.entries(legends).map(([name, entries]) => this.list(layout[name] ?? {}, [...entries], layout))
  }

  list({ xanchor, y = 1, yanchor, traceorder }, entries, { margin, height }) {
    const list = element("div", { class: "gm-legend", role: "group", "aria-label": "Legend" })
    list.style.left = `${margin.l}px`
    list.style.right = `${margin.r}px`
    list.style.justifyContent = xanchor === "right" ? "end" : "start"
    const inner = height - margin.t - margin.b
    const under = yanchor === "top"
    list.style.bottom = under ? 0 : `${margin.b + y * inner}px`
    for (const [group, trace] of traceorder === "reversed" ? entries.reverse() : entries) {
      const title = "Click to hide or show it, twice to see it alone"
      const button = element("button", { type: "button", title, "data-group": group }, swatch(trace), plain(trace.name))
      button.onclick = event => this.choose(group, entries, event.detail > 1)
      list.append(button)
    }
    this.place.append(list)
    return { list, outside: under ? "under" : y >= 1 && "above", below: under ? -y * inner : (y - 1) * inner }
  }

  choose(group, entries, alone) {
    const others = entries.map(([other]) => other).filter(other => other !== group)
    if (alone) {
      const wasAlone = others.every(other => this.hidden.has(other))
      for (const other of others) wasAlone ? this.hidden.delete(other) : this.hidden.add(other)
      this.hidden.delete(group)
    } else if (!this.hidden.delete(group)) this.hidden.add(group)
    this.mark()
    this.changed(this.groups.map(one => (this.hidden.has(one) ? "legendonly" : true)))
  }

  mark() {
    for (const button of this.place.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(!this.hidden.has(button.dataset.group)))
    }
  }
}
