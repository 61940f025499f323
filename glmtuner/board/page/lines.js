"use strict";
{
  // The lines of curves: their colours, their smoothing, and how many points become a path.

  // Contrast of 3 and more on the light and on the dark page, and at least 21 in CIELAB between any two of them,
  // also as protanopes, deuteranopes and tritanopes see them (Machado et al. 2009). From the ninth run on the
  // lines have marks as well.
  const palette = ["#5891ed", "#f8631b", "#7f4cff", "#76796f", "#ce0cb6", "#ab8e64", "#e31732", "#d969b4"];
  board.colours = (ids) =>
    new Map(
      ids.map((id, place) => [
        id,
        { colour: palette[place % palette.length], round: Math.floor(place / palette.length) },
      ]),
    );

  // Debiased exponential moving average: the first values are not drawn towards 0. `weight` is the share of what
  // was before.
  board.smooth = (values, weight) => {
    const smoothed = new Float64Array(values.length);
    let sum = 0;
    let left = 1;
    values.forEach((value, place) => {
      if (!Number.isFinite(value)) {
        smoothed[place] = NaN;
        return;
      }
      sum = weight * sum + (1 - weight) * value;
      left *= weight;
      smoothed[place] = sum / (1 - left);
    });
    return smoothed;
  };
  // the first place whose value is at least `value`
  const place = (values, value) => {
    let low = 0;
    let high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const numbers = (values) => Float64Array.from(values, (value) => (typeof value === "number" ? value : NaN));
  board.swatch = ({ colour, round }, isDashed) => {
    const picture = board.svg(
      "svg",
      { width: 22, height: 10, "aria-hidden": "true", class: "swatch" },
      board.svg("line", {
        x1: 0,
        x2: 22,
        y1: 5,
        y2: 5,
        stroke: colour,
        "stroke-width": 2.5,
        "stroke-dasharray": isDashed ? "5 3" : null,
      }),
    );
    if (round)
      picture.append(board.svg("path", { d: round % 2 ? "M7.5 1.5h7v7h-7z" : "M11 0.5l4.5 8.5h-9z", fill: colour }));
    return picture;
  };

  // Draws a line: of all points that share a column of pixels the first, the lowest, the highest and the last
  // one. Where the columns are tall, as those of thousands of noisy values are, each is a rectangle, which takes
  // a processor a tenth of the time of a stroke. `area` is { width, min, max, top(value), isDrawn(value) }: the
  // width in pixels, the ends of the axis, the height of a value, and whether it has one. Returns how many
  // points were in it.
  board.paintLine = (context, x, y, area, thickness, dash) => {
    const { width, min, max, top, isDrawn } = area;
    const from = Math.max(0, place(x, min) - 1);
    const to = Math.min(x.length - 1, place(x, max));
    const scale = width / (max - min);
    const isDense = to - from > 2 * width;
    const columns = []; // pixel, first, lowest, highest, last as heights; null where the line is broken
    let [pixel, at, first, low, high, last, points] = [NaN, 0, 0, 0, 0, 0, 0];
    const flush = () => {
      if (Number.isNaN(pixel)) return;
      columns.push([isDense ? pixel : at, top(first), top(low), top(high), top(last)]);
      pixel = NaN;
    };
    for (let index = from; index <= to; index += 1) {
      const value = y[index];
      if (!isDrawn(value)) {
        flush();
        if (columns.length && columns[columns.length - 1]) columns.push(null);
        continue;
      }
      points += 1;
      const exact = (x[index] - min) * scale;
      const next = Math.round(exact);
      if (next === pixel) {
        if (value < low) low = value;
        if (value > high) high = value;
        last = value;
        continue;
      }
      flush();
      pixel = next;
      at = exact;
      first = low = high = last = value;
    }
    flush();
    const tall = columns.reduce((sum, column) => sum + (column ? column[2] - column[3] : 0), 0);
    let before = null;
    if (columns.length > width / 4 && tall > 4 * columns.length) {
      for (const column of columns) {
        if (column) {
          // as far as where the column before it has ended
          const lowest = before ? Math.max(column[2], before[4]) : column[2];
          const highest = before ? Math.min(column[3], before[4]) : column[3];
          const isGap = dash.length && column[0] % (dash[0] + dash[1]) >= dash[0];
          if (!isGap)
            context.fillRect(
              Math.round(column[0]),
              Math.floor(highest),
              Math.max(1, Math.round(thickness * 0.75)),
              Math.max(1, Math.ceil(lowest - highest)),
            );
        }
        before = column;
      }
      return points;
    }
    if (points > 3 * columns.length && columns.length > width / 4) {
      // many values that lie close together: the band between the lowest and the highest, as thick as the line at least
      const band = [];
      const fill = () => {
        if (!band.length) return;
        context.beginPath();
        for (const [at, , , highest] of band) context.lineTo(at, highest - thickness / 2);
        for (const [at, , lowest] of band.splice(0).reverse()) context.lineTo(at, lowest + thickness / 2);
        context.fill();
      };
      for (const column of columns) {
        if (column === null || (dash.length && column[0] % (dash[0] + dash[1]) >= dash[0])) fill();
        else band.push(column);
      }
      fill();
      return points;
    }
    context.beginPath();
    for (const column of columns) {
      if (column) {
        const [at, begin, lowest, highest, end] = column;
        if (before) context.lineTo(at, begin);
        else context.moveTo(at, begin);
        if (lowest > begin && lowest > end) context.lineTo(at, lowest);
        if (highest < begin && highest < end) context.lineTo(at, highest);
        if (end !== begin) context.lineTo(at, end);
      }
      before = column;
    }
    context.lineWidth = thickness;
    context.setLineDash(dash);
    context.stroke();
    context.setLineDash([]);
    return points;
  };

  board.lines = { place, numbers };
}
