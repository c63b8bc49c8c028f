//! Draws the processor time of a transaction as SVG: a bar for each column of the table, with a part for each process. Works on light
//! and on dark pages.

use super::{
    plot::{COLOURS, LINE, STYLE, number, round_up, short},
    report::Outcome,
};

/// The parts of a bar: the figure, and its name in the legend.
const PARTS: [(&str, &str); 3] = [
    ("coordinator_cpu", "coordinator"),
    ("server_cpu", "the store's server"),
    ("program_cpu", "initiators and participants"),
];
const WIDTH: f64 = 860.0;
/// Room for the names of the bars.
const LEFT: f64 = 330.0;
/// Room for the sums behind the bars.
const RIGHT: f64 = 60.0;
const TOP: f64 = 34.0;
/// Height of a bar, and distance between the tops of two bars.
const BAR: f64 = 20.0;
const STEP: f64 = 30.0;

pub(crate) fn svg(outcomes: &[Outcome]) -> String {
    let bars: Vec<_> = outcomes.iter().map(|outcome| (outcome.title(), parts(outcome))).collect();
    let sum = |parts: &[f64]| parts.iter().sum::<f64>();
    let most = round_up(bars.iter().map(|(_, parts)| sum(parts)).fold(0.0, f64::max));
    let width = |time: f64| (WIDTH - LEFT - RIGHT) * time / most;
    let legend = TOP + STEP * number(bars.len()) + LINE;
    let height = legend + LINE * number(PARTS.len());
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\">{STYLE}\n"
    );
    let mut draw = |element: String| svg.push_str(&(element + "\n"));
    draw(
        "<text class=\"title\" x=\"8\" y=\"18\">processor time a transaction, µs</text>".to_owned(),
    );
    for (n, (title, parts)) in bars.iter().enumerate() {
        let (mut x, y) = (LEFT, TOP + STEP * number(n));
        let baseline = y + BAR - 5.0;
        let title = title.replace('\n', ", ");
        draw(format!(
            "<text x=\"{}\" y=\"{baseline}\" text-anchor=\"end\">{title}</text>",
            LEFT - 8.0
        ));
        for (part, colour) in parts.iter().zip(COLOURS) {
            draw(format!(
                "<rect x=\"{x:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                width(*part)
            ));
            x += width(*part);
        }
        draw(format!("<text x=\"{:.1}\" y=\"{baseline}\">{}</text>", x + 6.0, short(sum(parts))));
    }
    for (n, ((_, name), colour)) in PARTS.iter().zip(COLOURS).enumerate() {
        let y = legend + LINE * number(n);
        draw(format!("<circle cx=\"{LEFT}\" cy=\"{}\" r=\"4\" fill=\"{colour}\"/>", y - 4.0));
        draw(format!("<text x=\"{}\" y=\"{y}\">{name}</text>", LEFT + 10.0));
    }
    svg.push_str("</svg>\n");
    svg
}

/// Microseconds of each process. A process that was not measured has none.
fn parts(outcome: &Outcome) -> Vec<f64> {
    let medians = outcome.medians();
    PARTS.iter().map(|(figure, _)| medians.get(figure).copied().unwrap_or(0.0)).collect()
}
