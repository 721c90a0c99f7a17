"use strict";
(() => {
  const text = (v) => (Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(4)));

  // The point of a series whose step is nearest.
  const nearest = (points, step) =>
    points.reduce((best, p) => (Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best));

  // Values under the pointer, and under a slider that a keyboard, a finger and a screen reader can move.
  const readable = (figure) => {
    const { x: [first, last], series } = JSON.parse(figure.dataset.chart);
    const steps = [...new Set(series.flatMap(([, points]) => points.map((p) => p[0])))].sort((a, b) => a - b);
    const area = figure.querySelector(".plot svg"), cursor = figure.querySelector(".cursor");
    const box = figure.querySelector(".read"), slider = box.querySelector("input"), output = box.querySelector("output");
    const show = (index) => {
      const step = steps[index], across = last > first ? ((step - first) / (last - first)) * 1000 : 500;
      const values = series.map(([name, points]) => {
        const [at, value] = nearest(points, step);
        return `${name} ${text(value)}${at === step ? "" : ` (step ${at})`}`;
      });
      output.value = `step ${step}: ${values.join(", ")}`;
      slider.value = index;
      slider.setAttribute("aria-valuetext", output.value);
      cursor.setAttribute("x1", across);
      cursor.setAttribute("x2", across);
    };
    slider.max = steps.length - 1;
    slider.addEventListener("input", () => {
      cursor.removeAttribute("visibility");
      show(+slider.value);
      slider.dataset.step = steps[+slider.value];
    });
    slider.read = (step) => {
      slider.value = steps.indexOf(nearest(steps.map((s) => [s]), step)[0]);
      slider.dispatchEvent(new Event("input"));
    };
    area.addEventListener("pointermove", (event) => {
      const edges = area.getBoundingClientRect();
      const wanted = first + ((event.clientX - edges.left) / edges.width) * (last - first);
      const step = nearest(steps.map((s) => [s]), wanted)[0];
      cursor.removeAttribute("visibility");
      show(steps.indexOf(step));
    });
    area.addEventListener("pointerleave", () => cursor.setAttribute("visibility", "hidden"));
    show(steps.length - 1);
    box.hidden = false;
  };
  const start = () => document.querySelectorAll("figure[data-chart]").forEach(readable);
  start();

  // Print everything that is folded.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((d) => (d.open = true));
  });
  addEventListener("afterprint", () => opened.forEach((d) => (d.open = false)));

  // A served page reads itself again; what the reader has unfolded, the steps read, and where the focus is, stay.
  if (document.body.hasAttribute("data-live")) {
    const state = document.querySelector("#live");
    let version = null;
    const again = async () => {
      try {
        const reply = await fetch("/", { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
        state.textContent = "";
        if (reply.ok) {
          version = reply.headers.get("ETag");
          const page = new DOMParser().parseFromString(await reply.text(), "text/html");
          const open = new Set([...document.querySelectorAll("details[open]")].map((d) => d.dataset.name));
          const held = new Map([...document.querySelectorAll(".read input[data-step]")].map((e) => [e.dataset.focus, +e.dataset.step]));
          const focus = document.activeElement && document.activeElement.dataset.focus;
          document.querySelector("main").replaceWith(page.querySelector("main"));
          document.querySelectorAll("details").forEach((d) => { if (open.has(d.dataset.name)) d.open = true; });
          start();
          document.querySelectorAll(".read input").forEach((e) => { if (held.has(e.dataset.focus)) e.read(held.get(e.dataset.focus)); });
          if (focus) [...document.querySelectorAll("[data-focus]")].find((e) => e.dataset.focus === focus)?.focus();
        }
      } catch {
        state.textContent = "The page is no longer served; it shows the last state.";
      }
      setTimeout(again, 2000);
    };
    setTimeout(again, 2000);
  }
})();
