// Downloads that tell how far they are: the server streams rows, and says beforehand how many.
const NEWLINE = 10
const boxes = new WeakMap()

const count = number => number.toLocaleString("en")

async function fetchRows(file, total, tell, signal) {
  const answer = await fetch(file.url, { signal })
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail ?? answer.statusText)
  const all = Number(answer.headers.get("X-Total-Rows") ?? total)
  const parts = []
  let rows = -1
  let bytes = 0
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read()
    if (done) break
    parts.push(value)
    bytes += value.length
    if (file.rows) for (const byte of value) rows += byte === NEWLINE
    const mib = (bytes / 2 ** 20).toFixed(1)
    tell(file.rows && all ? Math.min(1, rows / all) : null, file.rows ? `${count(Math.max(0, Math.min(rows, all)))} of ${count(all)} rows` : `${mib} MiB`)
  }
  return new Blob(parts, { type: file.type })
}

export default function ({ data, parentElement }) {
  let box = boxes.get(parentElement)
  if (!box) {
    box = { root: parentElement.querySelector(".downloads"), running: null }
    boxes.set(parentElement, box)
  }
  box.data = data
  const [buttons, bar, text] = [".buttons", "progress", ".told"].map(name => box.root.querySelector(name))
  while (buttons.children.length < data.files.length) buttons.append(document.createElement("button"))
  data.files.forEach((_, place) => {
    const button = buttons.children[place]
    button.type = "button"
    button.textContent = `↓ ${data.files[place].label}`
    button.disabled = data.total === 0 || box.running !== null
    button.onclick = async () => {
      const file = box.data.files[place]
      box.running = new AbortController()
      for (const other of buttons.children) other.disabled = true
      bar.hidden = false
      text.textContent = ""
      try {
        const blob = await fetchRows(file, box.data.total, (share, told) => {
          share === null ? bar.removeAttribute("value") : (bar.value = share)
          text.textContent = told
        }, box.running.signal)
        const link = document.createElement("a")
        link.href = URL.createObjectURL(blob)
        link.download = file.name
        link.click()
        setTimeout(() => URL.revokeObjectURL(link.href), 60000)
        text.textContent += ", done"
      } catch (error) {
        if (error.name !== "AbortError") text.textContent = `The download failed: ${error.message}`
      } finally {
        box.running = null
        bar.hidden = true
        for (const other of buttons.children) other.disabled = box.data.total === 0
      }
    }
  })
  return () => {
    box.running?.abort()
    boxes.delete(parentElement)
  }
}
