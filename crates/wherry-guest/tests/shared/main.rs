//! What host and guest share: the pattern of the data, the parameters, the report pages, the image.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod accel;
mod data;
mod document;
mod image;
mod net;
mod params;
mod ram;
mod snapshot;
mod sources;
mod testdma;
