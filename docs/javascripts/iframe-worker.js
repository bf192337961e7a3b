// Search from the file system: browsers start no worker from a file, so that a frame stands in for it (after the
// package iframe-worker, which the theme would load from elsewhere). Pages that come from a server keep their worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      this.inside = this.frame.contentWindow
      window.addEventListener("message", event => {
        if (event.source !== this.inside) return
        const copy = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(copy)
        if (this.onmessage) this.onmessage(copy)
      })
      this.ready = new Promise(resolve => {
        this.frame.onload = resolve
      })
      const page = this.inside.document
      page.open()
      page.write(
        "<html><body><script>" +
          "postMessage = parent.postMessage.bind(parent);" +
          "importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(done => {" +
          "const script = document.createElement('script');" +
          "script.src = url; script.onload = done; document.body.appendChild(script) })), Promise.resolve())" +
          "<\/script><script src='" + url + "'><\/script></body></html>"
      )
      page.close()
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
}
