//! Specs as people write them, well and badly.

use proptest::prelude::*;

use super::*;

fn error(text: &str) -> String {
    text.parse::<DeviceSpec>().unwrap_err().to_string()
}

#[test]
fn a_compressed_pool_needs_only_its_size() {
    let lz4 = DeviceSpec::Compressed {
        capacity_bytes: 2 << 30,
        algorithm: Algorithm::Lz4,
    };
    assert_eq!("compressed:2G".parse(), Ok(lz4.clone()));
    assert_eq!("compressed:2G,algorithm=lz4".parse(), Ok(lz4));
}

#[test]
fn a_compressed_pool_takes_an_algorithm_and_a_level() {
    let algorithm = Algorithm::Zstd { level: 3 };
    let zstd = DeviceSpec::Compressed {
        capacity_bytes: 512 << 20,
        algorithm,
    };
    assert_eq!(
        "compressed:512M,algorithm=zstd,level=3".parse(),
        Ok(zstd.clone())
    );
    assert_eq!("compressed:512MiB,level=3,algorithm=zstd".parse(), Ok(zstd));
}

#[test]
fn a_file_takes_its_size_and_options_in_any_order() {
    let spec = DeviceSpec::File {
        path: "/var/tmp/cold.pgmap".into(),
        size_bytes: 8 << 30,
        keep: true,
        direct: Direct::Off,
    };
    assert_eq!(
        "file:/var/tmp/cold.pgmap,size=8G,keep,direct=off".parse(),
        Ok(spec.clone())
    );
    assert_eq!(
        "file:/var/tmp/cold.pgmap,direct=off,keep,size=8G".parse(),
        Ok(spec)
    );
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    for (text, part) in [
        ("", "no device is called ``: use"),
        ("zram:2G", "no device is called `zram`: use compressed:SIZE"),
        ("compressed", "compressed needs a size: write compressed:2G"),
        ("compressed:algorithm=zstd", "compressed needs a size"),
        (
            "compressed:64Q",
            "`64Q` has no unit that pgmap knows: use K, M, G or T",
        ),
        ("compressed:0", "`0` is too small"),
        ("compressed:99999999T", "`99999999T` is too large"),
        (
            "compressed:1G,color=red",
            "compressed has no option `color`: use algorithm=",
        ),
        (
            "compressed:1G,algorithm=gzip",
            "`algorithm=gzip` is not possible: algorithm is lz4 or",
        ),
        (
            "compressed:1G,algorithm=zstd,level=99",
            "`level=99` is not possible",
        ),
        ("compressed:1G,level=3", "level is for algorithm=zstd only"),
        (
            "compressed:1G,level=3,level=4",
            "the option `level` is given twice",
        ),
        ("compressed:1G,", "compressed has no option ``"),
        ("file:", "file needs a path first"),
        ("file:size=8G", "file needs a path first"),
        ("file:/x", "file needs a size: write file:"),
        ("file:/x,size=", "`` is no size"),
        (
            "file:/x,size=1G,direct=on",
            "`direct=on` is not possible: direct is auto or off",
        ),
        ("file:/x,size=1G,keep=yes", "file has no option `keep`"),
        ("faulty:corrupt:compressed:1G", "a faulty device is faulty:"),
        (
            "faulty:corrupt@every=3:zram:1G",
            "no device is called `zram`",
        ),
    ] {
        let error = error(text);
        assert!(error.contains(part), "{text}: {error}");
        assert!(!error.contains('\n'), "{text}: {error}");
    }
}

fn spec() -> impl Strategy<Value = DeviceSpec> {
    let algorithm = prop_oneof![
        Just(Algorithm::Lz4),
        ZSTD_LEVELS.prop_map(|level| Algorithm::Zstd { level })
    ];
    let size = 4096..u64::MAX;
    let compressed =
        (size.clone(), algorithm).prop_map(|(capacity_bytes, algorithm)| DeviceSpec::Compressed {
            capacity_bytes,
            algorithm,
        });
    let direct = prop_oneof![Just(Direct::Auto), Just(Direct::Off)];
    let path = "(/[a-zA-Z0-9:=. @-]{1,9}){1,3}x".prop_map(PathBuf::from);
    let file = (path, size, any::<bool>(), direct).prop_map(|(path, size_bytes, keep, direct)| {
        DeviceSpec::File {
            path,
            size_bytes,
            keep,
            direct,
        }
    });
    let working = prop_oneof![compressed, file];
    let when = prop_oneof![
        (1_u64..9).prop_map(When::Every),
        any::<u64>().prop_map(When::After)
    ];
    let plan = (prop::sample::select(&Fault::ALL[..]), when);
    (working, prop::option::of(plan)).prop_map(|(device, plan)| match plan {
        None => device,
        Some((fault, when)) => DeviceSpec::Faulty {
            plan: Plan { fault, when },
            device: Box::new(device),
        },
    })
}

proptest! {
    #[test]
    fn what_is_shown_reads_back(spec in spec()) {
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }

    #[test]
    fn no_text_makes_it_panic(text in "(compressed|file|faulty)?[:,=a-z0-9@]*") {
        let _ = text.parse::<DeviceSpec>();
    }
}
