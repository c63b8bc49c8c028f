//! Integration tests of Handfast.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "these are tests, their helpers too")]

mod process;
mod serve;

mod chaos;
mod copies;
mod fuzz;
mod groups;
mod mishaps;
mod mysql;
mod nested;
mod recovery;
mod takeover;

mod operators;
mod secrets;
mod shop;
mod simulation;

mod bench;

mod tidy;
