// A page asks for news when a new sample should be there: this long after it is due, so that it has been written.
const LATE_MS = 300
// Whoever gets no answer asks again.
const PATIENCE_MS = 5000
const HELD = "gpumon.held"
const PAUSE = "M3 2h4v12H3zM9 2h4v12H9z"
const PLAY = "M3 2l11 6-11 6z"

const rhythms = new WeakMap()

function words(seconds) {
  const s = Math.floor(seconds)
  if (s < 60) return `${s}s`
  if (s < 3600) return `${Math.floor(s / 60)}m ${s % 60}s`
  if (s < 86400) return `${Math.floor(s / 3600)}h ${Math.floor(s / 60) % 60}m`
  return `${Math.floor(s / 86400)}d ${Math.floor(s / 3600) % 24}h`
}

class Rhythm {
  constructor(root) {
    this.fresh = root.querySelector(".fresh")
    this.text = root.querySelector(".text")
    this.button = root.querySelector(".pause")
    this.button.onclick = () => this.hold(!this.held)
    this.held = sessionStorage.getItem(HELD) === "1"
    this.clock = setInterval(() => this.draw(), 1000)
    this.onShown = () => this.plan()
    document.addEventListener("visibilitychange", this.onShown)
  }

  take(data, beat) {
    this.data = data
    this.beat = beat
    this.received = performance.now()
    this.asked = null
    this.draw()
    this.plan()
  }

  hold(held) {
    this.held = held
    sessionStorage.setItem(HELD, held ? "1" : "0")
    this.draw()
    this.plan()
  }

  sinceMs() {
    return performance.now() - this.received
  }

  // How long until the page should ask: right after the next sample, or, of a page that follows less closely, after
  // some more. A page that was hidden for longer asks at once.
  waitMs() {
    const { age, sampledEvery, limit } = this.data
    const refresh = Math.max(this.data.refresh, sampledEvery)
    if (this.asked !== null) return Math.max(0, this.asked + Math.max(PATIENCE_MS, 1000 * refresh) - performance.now())
    const late = age === null || age > limit
    const due = late ? refresh : refresh - (age % sampledEvery)
    return Math.max(0, 1000 * Math.max(due, 0.1) + LATE_MS - this.sinceMs())
  }

  plan() {
    clearTimeout(this.timer)
    if (this.held || document.hidden) return
    this.timer = setTimeout(() => {
      this.asked = performance.now()
      this.beat()
      this.plan()
    }, this.waitMs())
  }

  draw() {
    const { age, limit, refresh, sampledEvery } = this.data
    const now = age === null ? null : age + this.sinceMs() / 1000
    // A page that asks less often than there are samples has older ones until it asks: that is no silence.
    const stale = now === null || age > limit || now > limit + Math.max(0, refresh - sampledEvery)
    this.fresh.classList.toggle("stale", stale && !this.held)
    this.fresh.classList.toggle("held", this.held)
    if (now === null) this.text.textContent = "No sample yet"
    else if (this.held) this.text.textContent = `Paused, showing ${words(now)} ago`
    else this.text.textContent = stale ? `No new sample for ${words(now)}` : `Newest sample ${words(now)} ago`
    this.button.setAttribute("aria-pressed", String(this.held))
    this.button.title = this.held ? "Follow the newest sample again" : "Hold this page still"
    this.button.querySelector("path").setAttribute("d", this.held ? PLAY : PAUSE)
    this.button.querySelector("span").textContent = this.held ? "Resume" : "Pause"
  }

  end() {
    clearInterval(this.clock)
    clearTimeout(this.timer)
    document.removeEventListener("visibilitychange", this.onShown)
  }
}

// On a phone the menu lies over the page. It closes once it has led to another page; rhythm.py puts in CLOSE_MENU.
let last = location.pathname
function closeMenu() {
  if (location.pathname === last) return
  last = location.pathname
  if (matchMedia("(max-width: 767px)").matches) document.querySelector(CLOSE_MENU)?.click()
}

export default function ({ data, parentElement, setTriggerValue }) {
  closeMenu()
  let rhythm = rhythms.get(parentElement)
  if (!rhythm) rhythms.set(parentElement, (rhythm = new Rhythm(parentElement)))
  rhythm.take(data, () => setTriggerValue("beat", Date.now()))
  return () => {
    rhythm.end()
    rhythms.delete(parentElement)
  }
}
