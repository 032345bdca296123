// Draws every figure in the page's colours, and again when they change: light, dark, paper.
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const paper = { "--ink": "#1c1f24", "--grid": "#e6e9ed", "--rule": "#d9dde3", "--card": "#f5f6f8" };
  let printing = false;

  const colour = (name) =>
    printing ? paper[name] : getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function layoutOf(spec, node) {
    const axis = (own) => ({
      ...own, gridcolor: colour("--grid"), linecolor: colour("--rule"), zerolinecolor: colour("--ink"),
    });
    return {
      ...spec.layout,
      width: node.clientWidth,
      font: { ...spec.layout.font, color: colour("--ink") },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
      xaxis: axis(spec.layout.xaxis),
      yaxis: axis(spec.layout.yaxis),
    };
  }

  const draw = () =>
    Promise.all(
      plots.map((node, place) =>
        Plotly.react(node, specs[place].data, layoutOf(specs[place], node), { displayModeBar: false })
      )
    );

  let width = 0;
  let waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 80);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Figures do not follow the paper's width by themselves: the page takes it on before they are drawn.
  const print = (now) => {
    printing = now;
    document.documentElement.classList.toggle("printing", now);
    draw();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  width = innerWidth;
  draw().then(() => { document.documentElement.dataset.drawn = String(plots.length); });
})();
