//! What the jobs of the accelerator's driver are made of and come to.

use wherry_guest::accel::{PROGRAM, crc32c, job_word, program_fuel, program_result, sha256};

#[test]
fn checksums_and_digests_are_those_of_the_standards() {
    // RFC 3720, B.4, and the check value of the CRC catalogue.
    assert_eq!(crc32c(0, b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(0, &[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(crc32c(0, b"1234"), b"56789"), 0xe306_9283);
    let hex = |digest: [u8; 32]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(sha256(&[])), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    // FIPS 180-2: a million times "a" is a multiple of 64 bytes long.
    let million = vec![b'a'; 1_000_000];
    assert_eq!(hex(sha256(&million)), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

#[test]
fn words_of_other_jobs_rings_seeds_and_places_differ() {
    for word in 1..4096 {
        let here = job_word(1, 2, 7, word);
        for other in
            [job_word(1, 2, 8, word), job_word(1, 3, 7, word), job_word(2, 2, 7, word), job_word(1, 2, 7, word - 1)]
        {
            assert_ne!(here, other);
        }
    }
}

#[test]
fn the_program_is_a_loop_whose_end_is_known() {
    assert_eq!(program_result([3, 5].into_iter()), 3 * 31 + 5);
    assert_eq!((PROGRAM.len(), program_fuel(512)), (9, 3075));
    // The jump leads to the instruction behind the first.
    assert_eq!((PROGRAM[6] >> 16) as u16 as i16, 1 - 7);
}
