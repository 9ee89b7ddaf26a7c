//! An endpoint as a user or a peer writes it: refused, or written as it was read.
#![no_main]

use libfuzzer_sys::fuzz_target;
use wherry_stream::Endpoint;

fuzz_target!(|text: &str| {
    match text.parse::<Endpoint>() {
        Ok(endpoint) => assert_eq!(endpoint.to_string().parse::<Endpoint>(), Ok(endpoint)),
        Err(error) => assert!(error.to_string().len() < 4096, "a message as long as the nonsense"),
    }
});
