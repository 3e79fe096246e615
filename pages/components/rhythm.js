// A page asks for the next sample this long after it is due: by then it has been written.
const DELAY_MS = 300
// A page without an answer asks again after this time.
const PATIENCE_MS = 5000
const PAUSED = "gpumon.paused"
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
    this.button.onclick = () => this.pause(!this.isPaused)
    this.isPaused = sessionStorage.getItem(PAUSED) === "1"
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

  pause(isPaused) {
    this.isPaused = isPaused
    sessionStorage.setItem(PAUSED, isPaused ? "1" : "0")
    this.draw()
    this.plan()
  }

  sinceMs() {
    return performance.now() - this.received
  }

  // How long until the page asks: until right after the next sample, or after a later one where the page refreshes
  // less often. A page that was hidden for longer asks at once.
  waitMs() {
    const { age, sampledEvery, limit } = this.data
    const refresh = Math.max(this.data.refresh, sampledEvery)
    if (this.asked !== null) return Math.max(0, this.asked + Math.max(PATIENCE_MS, 1000 * refresh) - performance.now())
    const isLate = age === null || age > limit
    const due = isLate ? refresh : refresh - (age % sampledEvery)
    return Math.max(0, 1000 * Math.max(due, 0.1) + DELAY_MS - this.sinceMs())
  }

  plan() {
    clearTimeout(this.timer)
    if (this.isPaused || document.hidden) return
    this.timer = setTimeout(() => {
      this.asked = performance.now()
      this.beat()
      this.plan()
    }, this.waitMs())
  }

  draw() {
    const { age, limit, refresh, sampledEvery } = this.data
    const now = age === null ? null : age + this.sinceMs() / 1000
    // A page that asks less often than there are samples shows an older one until it asks: recording goes on.
    const isStale = now === null || age > limit || now > limit + Math.max(0, refresh - sampledEvery)
    this.fresh.classList.toggle("stale", isStale && !this.isPaused)
    this.fresh.classList.toggle("paused", this.isPaused)
    if (now === null) this.text.textContent = "No sample yet"
    else if (this.isPaused) this.text.textContent = `Paused, showing ${words(now)} ago`
    else this.text.textContent = isStale ? `No new sample for ${words(now)}` : `Newest sample ${words(now)} ago`
    this.button.setAttribute("aria-pressed", String(this.isPaused))
    this.button.title = this.isPaused ? "Follow the newest sample again" : "Stop updating this page"
    this.button.querySelector("path").setAttribute("d", this.isPaused ? PLAY : PAUSE)
    this.button.querySelector("span").textContent = this.isPaused ? "Resume" : "Pause"
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
