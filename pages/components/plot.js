// Draws Plotly figures below each other that share their time axis: one hover line through all of them, and a zoom
// in one is the zoom of all. The library comes from this server; plot.py puts in `LIBRARY`.
// The ends of an axis are no handles: a drag across the chart zooms.
const CONFIG = { displaylogo: false, displayModeBar: false, doubleClick: false, showAxisDragHandles: false }
const NARROW_PX = 560
// What Plotly leaves free on the two sides of a bar's name, and less than any letter of it is wide.
const TEXT_PADDING_PX = 6
const NARROWEST_PX = 2
const TOUCH = matchMedia("(pointer: coarse)").matches

let loading
function plotly() {
  loading ??= new Promise((resolve, reject) => {
    if (window.Plotly) return resolve(window.Plotly)
    const script = document.createElement("script")
    script.src = LIBRARY
    script.onload = () => resolve(window.Plotly)
    script.onerror = () => {
      // The server may have been away for a moment: the next figure tries again.
      loading = undefined
      script.remove()
      reject(new Error(`${LIBRARY} cannot be loaded`))
    }
    document.head.append(script)
  })
  return loading
}

// An array that a figure uses several times is sent once: see figures.as_json.
function expanded(figure) {
  const put = value => {
    if (Array.isArray(value)) return value.map(put)
    if (value === null || typeof value !== "object") return value
    if ("array" in value) return figure.arrays[value.array]
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, put(inner)]))
  }
  const [data, layout] = [figure.data, figure.layout].map(put)
  if (layout.xaxis?.type === "date") {
    const known = new Map()
    for (const trace of data) {
      if (trace.type !== "scatter" || trace.x?.dtype !== "f8") continue
      // Dates are faster than numbers: Plotly would test each number as a text first.
      if (!known.has(trace.x)) known.set(trace.x, Array.from(numbers(trace.x), value => new Date(value)))
      trace.x = known.get(trace.x)
    }
  }
  return { data, layout }
}

// The numbers of an array of doubles in base64.
function numbers({ bdata }) {
  const bytes = atob(bdata)
  const values = new Float64Array(bytes.length / 8)
  const into = new Uint8Array(values.buffer)
  for (let place = 0; place < bytes.length; place++) into[place] = bytes.charCodeAt(place)
  return values
}

const pen = document.createElement("canvas").getContext("2d")

// Names of bars, cut where their bars end: Plotly would write on beside the bar, in colours that cannot be read.
function fitting(trace, width, [from, to], family) {
  const lengths = trace.x?.dtype === "f8" ? numbers(trace.x) : trace.x
  pen.font = `${trace.insidetextfont.size}px ${family}`
  return trace.text.map((name, place) => {
    const room = (lengths[place] / (to - from)) * width - TEXT_PADDING_PX
    if (isWithin(name, room)) return name
    let end = name.length - 1
    while (end > 2 && !isWithin(`${name.slice(0, end)}…`, room)) end--
    // A character that is written as an entity is not cut in two.
    return end <= 2 ? "" : `${name.slice(0, end).replace(/&[^;]*$/, "")}…`
  })
}

function isWithin(name, room) {
  // No letter is narrower than this: most names need not be measured.
  return name.length * NARROWEST_PX <= room && pen.measureText(name).width <= room
}

const known = new WeakMap()

class Plots {
  constructor(root) {
    this.root = root
    this.box = root.querySelector(".gm-plots")
    this.line = root.querySelector(".gm-line")
    this.divs = []
    this.words = []
    this.turn = Promise.resolve()
    this.box.onmousemove = event => this.point(event)
    this.box.onmouseleave = () => (this.line.hidden = true)
    this.sizes = new ResizeObserver(() => this.resize())
    this.sizes.observe(this.box)
  }

  // One after the other: new figures may come while the ones before are being drawn.
  take(data, send) {
    this.send = send
    this.newest = data
    this.turn = this.turn.then(() => (data === this.newest ? this.draw(data) : null)).catch(error => {
      this.box.setAttribute("data-problem", String(error))
      console.error(error)
    })
  }

  async draw(data) {
    const Plotly = await plotly()
    if (this.ended) return
    while (this.divs.length > data.figures.length) {
      const surplus = this.divs.pop()
      Plotly.purge(surplus)
      surplus.parentElement.remove()
      this.words.pop()
    }
    for (const [place, text] of data.figures.entries()) {
      const figure = expanded(JSON.parse(text))
      figure.layout.uirevision = data.view
      // A narrow screen has no room for a legend at every chart; a touch shows the names of the lines.
      const isNarrow = this.box.clientWidth < NARROW_PX && Object.keys(figure.layout).some(name => /^legend\d/.test(name))
      // With these two, Plotly does not measure the labels, which takes as long as drawing the lines.
      for (const [name, axis] of Object.entries(figure.layout)) {
        if (/^[xy]axis/.test(name)) Object.assign(axis, { tickangle: 0, ticklabeloverflow: "allow", ...axis })
      }
      const { margin, xaxis, font } = figure.layout
      for (const trace of figure.data) {
        if (trace.constraintext !== "none") continue
        trace.text = fitting(trace, this.box.clientWidth - margin.l - margin.r, xaxis.range, font.family)
      }
      figure.layout.dragmode = data.zooms && !TOUCH ? "zoom" : false
      const isNew = place >= this.divs.length
      if (isNew) this.add()
      const div = this.divs[place]
      this.words[place].take(figure, data.view, isNarrow)
      div.setAttribute("aria-label", this.words[place].headings.join(", ") || data.alt)
      div.style.height = `${figure.layout.height}px`
      await Plotly.react(div, figure.data, figure.layout, CONFIG)
      if (this.ended) return Plotly.purge(div)
      if (isNew) this.listen(div)
      div.dataset.drawn = Number(div.dataset.drawn ?? 0) + 1
    }
    this.width = this.box.clientWidth
    this.zooms = data.zooms
    this.box.dataset.view = data.view
    this.box.dataset.drawn = Number(this.box.dataset.drawn ?? 0) + 1
  }

  add() {
    const div = element("div", { role: "img" })
    const words = element("div", { class: "gm-words" })
    this.divs.push(div)
    this.words.push(
      new Words(words, visible => {
        this.turn = this.turn.then(() => (this.ended ? null : window.Plotly.restyle(div, { visible })))
      })
    )
    this.box.append(element("div", { class: "gm-figure" }, div, words))
  }

  listen(div) {
    div.on("plotly_relayout", change => {
      const from = change["xaxis.range[0]"] ?? change["xaxis.range"]?.[0]
      const to = change["xaxis.range[1]"] ?? change["xaxis.range"]?.[1]
      if (!this.zooms || from === undefined || this.following) return
      // The other figures follow at once, before finer data comes.
      this.following = true
      const others = this.divs.filter(other => other !== div && other._fullLayout?.xaxis?.type === "date")
      Promise.all(others.map(other => window.Plotly.relayout(other, { "xaxis.range": [from, to] }))).finally(
        () => (this.following = false)
      )
      this.send([String(from), String(to)])
    })
    div.on("plotly_doubleclick", () => {
      if (this.zooms) this.send("out")
    })
  }

  point(event) {
    const layout = this.divs[0]?._fullLayout
    if (!layout) return
    const inside = event.clientX - this.box.getBoundingClientRect().left
    const { l, w } = layout._size
    this.line.hidden = inside < l || inside > l + w
    this.line.style.left = `${inside}px`
  }

  resize() {
    if (this.box.clientWidth === this.width || !this.box.clientWidth) return
    this.width = this.box.clientWidth
    this.turn = this.turn.then(() => {
      for (const div of this.divs) if (div._fullLayout) window.Plotly.Plots.resize(div)
    })
  }

  end() {
    this.ended = true
    this.sizes.disconnect()
    for (const div of this.divs) window.Plotly?.purge(div)
  }
}

export default function ({ data, parentElement, setTriggerValue }) {
  let plots = known.get(parentElement)
  if (!plots) known.set(parentElement, (plots = new Plots(parentElement)))
  plots.box.setAttribute("aria-label", data.alt)
  plots.take(data, zoom => setTriggerValue("zoom", zoom))
  return () => {
    plots.end()
    known.delete(parentElement)
  }
}
