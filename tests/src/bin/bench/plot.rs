//! Draws the table as SVG: throughput, latency and cost. Works on light and on dark pages.

use std::collections::BTreeMap;

use super::{options::Load, report::Outcome};

/// Width and height of a panel. The margins below hold numbers and names.
const PANEL: [f64; 2] = [420.0, 260.0];
const LEFT: f64 = 62.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;
/// Line height of the legend.
pub(super) const LINE: f64 = 18.0;
/// Grid lines in a panel, not counting the one at 0.
const GRID: u32 = 4;
/// A palette that colour-blind readers can tell apart, on white and on black.
pub(super) const COLOURS: [&str; 6] =
    ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"];
/// Text and lines follow the colour scheme of the page.
pub(super) const STYLE: &str = "<style>text{font:12px system-ui,sans-serif;fill:#444}line{stroke:#ccc}.title{font-weight:600}\
                     @media(prefers-color-scheme:dark){text{fill:#ccc}line{stroke:#555}}</style>";

/// The panels: a title, and the figures to draw with their legend texts.
const PANELS: [(&str, &[(&str, &str)]); 3] = [
    ("transactions completed a second", &[("completed_per_second", "")]),
    ("initiators wait, ms", &[("whole_p50", "p50"), ("whole_p99", "p99")]),
    (
        "processor time a transaction, µs",
        &[("coordinator_cpu", "coordinator"), ("server_cpu", "server")],
    ),
];

/// One line in a panel: its points from left to right. Each point is at one place of the axis.
#[derive(Debug)]
struct Line {
    name: String,
    points: Vec<(usize, f64)>,
}

/// The value on the horizontal axis: the load if it varies, otherwise the number of branches.
fn place(outcome: &Outcome, by_load: bool) -> u32 {
    if !by_load {
        return outcome.column.branches.into();
    }
    match outcome.column.load {
        Load::Closed(number) | Load::Open(number) | Load::Held(number) => number,
        Load::Beside { concurrency, .. } => concurrency,
    }
}

pub(crate) fn svg(outcomes: &[Outcome]) -> String {
    let by_load = outcomes.iter().any(|outcome| outcome.column.load != outcomes[0].column.load);
    let mut places: Vec<_> = outcomes.iter().map(|outcome| place(outcome, by_load)).collect();
    places.sort_unstable();
    places.dedup();
    let axis = match (by_load, outcomes[0].column.load) {
        (false, _) => "branches",
        (true, Load::Open(_)) => "begun a second",
        (true, _) => "at a time",
    };
    let panels: Vec<_> = PANELS
        .iter()
        .map(|(title, figures)| (title, lines(outcomes, figures, &places, by_load)))
        .collect();
    let most = panels.iter().map(|(_, lines)| lines.len()).max().unwrap_or_default();
    let [width, height] = PANEL;
    let (full_width, full_height) =
        (width * number(PANELS.len()), height + LINE * number(most) + 6.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {full_width} {full_height}\" width=\"{full_width}\">{STYLE}\n"
    );
    for (n, (title, lines)) in panels.iter().enumerate() {
        let x = width * number(n);
        svg.push_str(&format!("<g transform=\"translate({x} 0)\">\n"));
        panel(&mut svg, title, axis, &places, lines);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn lines(
    outcomes: &[Outcome],
    figures: &[(&str, &str)],
    places: &[u32],
    by_load: bool,
) -> Vec<Line> {
    let mut lines: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for outcome in outcomes {
        let (medians, at) = (outcome.medians(), place(outcome, by_load));
        let at = places.iter().position(|place| *place == at).expect("it is one of them");
        for (figure, meaning) in figures {
            let Some(value) = medians.get(figure) else { continue };
            let name = format!("{} {meaning}", outcome.series(by_load));
            lines.entry(name).or_default().push((at, *value));
        }
    }
    lines.into_iter().map(|(name, points)| Line { name, points }).collect()
}

fn panel(svg: &mut String, title: &str, axis: &str, places: &[u32], lines: &[Line]) {
    let [width, height] = PANEL;
    let largest = lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value);
    let top = round_up(largest.fold(0.0, f64::max));
    let x = |place: usize| {
        let step = (width - LEFT - RIGHT) / number(places.len().max(2) - 1);
        LEFT + step * number(place)
    };
    let y = |value: f64| height - BOTTOM - (height - TOP - BOTTOM) * value / top;
    let mut draw = |element: String| svg.push_str(&(element + "\n"));
    draw(format!("<text class=\"title\" x=\"{LEFT}\" y=\"18\">{title}</text>"));
    for n in 0..=GRID {
        let value = top * f64::from(n) / f64::from(GRID);
        let (y, right) = (y(value), width - RIGHT);
        draw(format!("<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>"));
        let (x, y) = (LEFT - 8.0, y + 4.0);
        draw(format!("<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>", short(value)));
    }
    for (n, place) in places.iter().enumerate() {
        let (x, y) = (x(n), height - BOTTOM + 18.0);
        draw(format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{place}</text>"));
    }
    let (middle, below) = ((LEFT + width - RIGHT) / 2.0, height - 6.0);
    draw(format!("<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{axis}</text>"));
    for (n, line) in lines.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let points =
            line.points.iter().map(|(place, value)| format!("{:.1},{:.1}", x(*place), y(*value)));
        let points = points.collect::<Vec<_>>();
        draw(format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
            points.join(" ")
        ));
        for point in points {
            let (x, y) = point.split_once(',').expect("written above");
            draw(format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{colour}\"/>"));
        }
        let y = height + LINE * (number(n) + 0.5);
        draw(format!("<circle cx=\"{LEFT}\" cy=\"{}\" r=\"4\" fill=\"{colour}\"/>", y - 4.0));
        draw(format!("<text x=\"{}\" y=\"{y}\">{}</text>", LEFT + 10.0, line.name.trim()));
    }
}

/// Rounds up to 1, 2 or 5 times a power of ten.
pub(super) fn round_up(value: f64) -> f64 {
    let unit = 10_f64.powf(value.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    unit * steps.into_iter().find(|step| step * unit >= value).unwrap_or(10.0)
}

pub(super) fn short(value: f64) -> String {
    if value >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

pub(super) fn number(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::MAX, f64::from)
}
