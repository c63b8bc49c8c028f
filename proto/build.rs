//! Compiles the .proto files with protox, so that nobody needs protoc; nothing else.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=handfast");
    let descriptors = protox::compile(
        [
            "handfast/v1/types.proto",
            "handfast/v1/coordinator.proto",
            "handfast/v1/participant.proto",
            "handfast/v1/admin.proto",
        ],
        ["."],
    )?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_transport(false) // clients are made from a channel; this crate needs no transport
        .bytes(".handfast.v1.Payload.data")
        .btree_map(".")
        .compile_fds(descriptors)?;
    Ok(())
}
