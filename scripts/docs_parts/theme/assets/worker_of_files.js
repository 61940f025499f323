// A page that was opened as a file may not start a Worker of another file, and the search runs in one. There, the script of a Worker is
// run in a hidden frame, which takes and sends messages like a Worker: copies, so that neither side changes what the other holds.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = this.onerror = this.onmessageerror = null;
      this.addEventListener("message", (event) => this.onmessage?.(event));
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      const inner = this.frame.contentWindow;
      inner.postMessage = (message) => {
        const data = structuredClone(message);
        setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      };
      const script = inner.document.createElement("script");
      this.ready = new Promise((resolve, reject) => {
        script.onload = resolve;
        script.onerror = reject;
      });
      this.ready.catch(() => this.onerror?.(new ErrorEvent("error", { message: `${url} cannot be read` })));
      script.src = url;
      inner.document.head.append(script);
    }

    postMessage(message) {
      const data = structuredClone(message);
      const deliver = () => this.frame.contentWindow?.dispatchEvent(new MessageEvent("message", { data }));
      this.ready.then(() => setTimeout(deliver), () => {});
    }

    terminate() {
      this.frame.remove();
    }
  };
}
