//! Images as people have them: fresh, locked, foreign, truncated, damaged.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{map, spec};
use pgmap_drivers::block::BlockDevice;
use pgmap_drivers::pmem::{Activation, Align, Mode, OpenError, Region, RegionError, Wanted};

fn refusal(text: &str) -> String {
    Region::open(&spec(text), 0).unwrap_err().to_string()
}

/// Opens it and does nothing: what is in it must not have changed.
fn is_refused(path: &Path, options: &str, part: &str) {
    let before = fs::read(path).unwrap();
    let refusal = refusal(&format!("{}{options}", path.display()));
    assert!(refusal.contains(part), "{refusal}");
    assert!(
        fs::read(path).unwrap() == before,
        "a refused image was changed"
    );
}

/// A fresh image of 1 GiB is one namespace of 1022 MiB, takes no room yet, and is the same when it is opened again.
#[test]
fn a_fresh_image_is_one_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let text = format!("{},size=1G", image.display());
    let region = Region::open(&spec(&text), 0).unwrap();
    let namespaces = region.namespaces();
    assert_eq!(namespaces.len(), 1);
    assert_eq!(namespaces[0].size_bytes(), 1022 << 20);
    assert_eq!(
        (namespaces[0].mode, namespaces[0].align),
        (Mode::Fsdax, Align::Pmd)
    );
    assert_eq!(region.overhead_bytes(), 2 << 20);
    assert_eq!(region.device_name(&namespaces[0]), "pmem0");
    assert_eq!(region.is_sparse(), Ok(true));
    let uuid = region.uuid();
    drop(region);
    for text in [text, image.display().to_string()] {
        let region = Region::open(&spec(&text), 0).unwrap();
        assert_eq!(
            (region.uuid(), region.namespaces()),
            (uuid, namespaces.clone())
        );
    }
}

/// Two servers on one image: the second is refused, until the first is gone.
#[test]
fn an_image_in_use_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let text = format!("{},size=8M", image.display());
    let first = Region::open(&spec(&text), 0).unwrap();
    assert!(refusal(&text).contains("in use by another pgmap"));
    assert!(refusal(&format!("{},mode=raw", image.display())).contains("in use"));
    drop(first);
    Region::open(&spec(&text), 0).unwrap();
}

/// What is no image is refused with what it is, and what to do.
#[test]
fn what_is_no_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display();
    assert!(refusal(&format!("{path}")).contains("is a directory: name a regular file"));
    assert!(refusal(&format!("{path},size=8M")).contains("is a directory"));
    assert!(refusal("/dev/null").contains("is a character device"));
    assert!(refusal(&format!("{path}/no/such.img,size=8M")).contains("No such file"));
    let missing = refusal(&format!("{path}/missing.img"));
    assert!(
        missing.contains("missing.img,size=1G to make one"),
        "{missing}"
    );
    assert!(refusal(&format!("{path}/small.img,size=1M")).contains("at least"));
    assert!(!directory.path().join("small.img").exists());
}

/// What a refused opening made is gone again, and what was there before is as it was.
#[test]
fn a_refused_opening_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("empty.img"), "").unwrap();
    fs::write(path("zeros.img"), vec![0; 5 << 20]).unwrap();
    // No file is so long, or has room for such a namespace; after that it is the same for one that is there already.
    for options in [
        ",size=9999999T",
        ",size=5M,align=1G",
        ",size=9999T,mode=raw",
    ] {
        for name in ["new.img", "empty.img", "zeros.img"] {
            refusal(&format!("{}{options}", path(name).display()));
        }
    }
    assert!(!path("new.img").exists());
    assert_eq!(fs::read(path("empty.img")).unwrap(), []);
    assert_eq!(fs::read(path("zeros.img")).unwrap(), vec![0; 5 << 20]);
    // One that was opened is taken back on request, unless it is in use; and nothing that somebody put in its place.
    let text = format!("{},size=8M", path("new.img").display());
    let region = Region::open(&spec(&text), 0).unwrap();
    let pmem = region.bind(&map(), 0).unwrap();
    region.take_back();
    assert!(path("new.img").exists());
    drop(pmem);
    fs::rename(path("new.img"), path("moved.img")).unwrap();
    fs::write(path("new.img"), "other").unwrap();
    region.take_back();
    assert_eq!(fs::read(path("new.img")).unwrap(), b"other");
    drop(region);
    let region = Region::open(&spec(&path("moved.img").display().to_string()), 0).unwrap();
    region.take_back();
    assert!(path("moved.img").exists());
    let text = format!("{},size=8M", path("second.img").display());
    let region = Region::open(&spec(&text), 0).unwrap();
    region.take_back();
    assert!(!path("second.img").exists());
    let text = format!("{},size=8M", path("empty.img").display());
    Region::open(&spec(&text), 0).unwrap().take_back();
    assert_eq!(fs::read(path("empty.img")).unwrap(), []);
}

/// A file that is too short for an image is somebody's if it has bytes, and to be made longer if it has none.
#[test]
fn a_short_file_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("text");
    fs::write(&path, "hello").unwrap();
    let said = refusal(&path.display().to_string());
    assert!(
        said.contains("5 bytes that are no image") && said.contains("mode=raw"),
        "{said}"
    );
    fs::write(&path, vec![0; 4096]).unwrap();
    let said = refusal(&path.display().to_string());
    assert!(said.contains("make it larger"), "{said}");
}

/// A symbolic link is followed.
#[test]
fn a_link_to_an_image_is_that_image() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let link = directory.path().join("link.img");
    let uuid = Region::open(&spec(&format!("{},size=8M", image.display())), 0)
        .unwrap()
        .uuid();
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let region = Region::open(&spec(&link.display().to_string()), 0).unwrap();
    assert_eq!(region.uuid(), uuid);
}

/// A file of another program is not overwritten unless that is asked for; zeros are nobody's.
#[test]
fn a_file_of_another_program_is_not_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("other.img");
    let file = File::create(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    // Not at the start: a file system has its mark at 1080.
    file.write_all_at(&[0x53, 0xef], 5 << 20).unwrap();
    is_refused(&image, "", "has no pgmap label: add mode=raw");
    is_refused(&image, ",size=16M", "has 8388608 bytes, not 16777216");
    Region::open(&spec(&format!("{},overwrite", image.display())), 0).unwrap();
    let zeros = directory.path().join("zeros.img");
    File::create(&zeros).unwrap().set_len(8 << 20).unwrap();
    Region::open(&spec(&zeros.display().to_string()), 0).unwrap();
}

/// In mode raw any file is served as it is, and nothing is written to it but what clients write.
#[test]
fn a_raw_file_is_served_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("other.img");
    fs::write(&image, vec![7; 5000]).unwrap();
    let region = Region::open(&spec(&format!("{},mode=raw", image.display())), 0).unwrap();
    let pmem = region.bind(&map(), 0).unwrap();
    assert_eq!(pmem.size_bytes(), 5000);
    pmem.write(4999, &[8]).unwrap();
    let mut bytes = [0; 2];
    pmem.read(4998, &mut bytes).unwrap();
    assert_eq!(bytes, [7, 8]);
    assert!(pmem.read(4999, &mut bytes).is_err());
    assert_eq!(
        region.set_activation(0, Activation::Disabled),
        Err(RegionError::Unlabelled(0))
    );
    assert_eq!(fs::read(&image).unwrap().len(), 5000);
}

/// A labelled image is not served with its label showing.
#[test]
fn a_labelled_image_is_not_served_raw() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    drop(Region::open(&spec(&format!("{},size=8M", image.display())), 0).unwrap());
    is_refused(&image, ",mode=raw", "has a pgmap label: leave out mode=raw");
}

/// An image that became shorter is refused; so is one whose labels are both damaged, and neither is written to, even if
/// overwriting is asked for.
#[test]
fn a_truncated_or_damaged_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    drop(Region::open(&spec(&format!("{},size=16M", image.display())), 0).unwrap());
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(8 << 20).unwrap();
    is_refused(
        &image,
        "",
        "has 8388608 of the 16777216 bytes that its label says",
    );
    file.set_len(16 << 20).unwrap();
    file.write_all_at(&[0xff], 100).unwrap();
    is_refused(&image, "", "the label area is damaged");
    is_refused(&image, ",overwrite", "the label area is damaged");
    let region = Region::open(&spec(&image.display().to_string()), 0);
    assert!(matches!(region, Err(OpenError::Label { .. })));
}

/// One damaged label is no harm: the other one is used, and the next change mends it.
#[test]
fn one_damaged_label_is_survived() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let text = image.display().to_string();
    let region = Region::open(&spec(&format!("{text},size=8M")), 0).unwrap();
    region.set_activation(0, Activation::Disabled).unwrap();
    drop(region);
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    // The newer one is the second: what it said is gone, the older one is whole.
    file.write_all_at(&[0xff], (512 << 10) + 100).unwrap();
    let region = Region::open(&spec(&text), 0).unwrap();
    assert_eq!(region.namespaces()[0].activation, Activation::Enabled);
    region.set_activation(0, Activation::Disabled).unwrap();
    drop(region);
    let region = Region::open(&spec(&text), 0).unwrap();
    assert_eq!(region.namespaces()[0].activation, Activation::Disabled);
}

/// Namespaces are made, kept and taken away; those in use stay.
#[test]
fn namespaces_come_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("disk.img");
    let text = format!("{},size=64M", image.display());
    let region = Region::open(&spec(&text), 2).unwrap();
    region.destroy_namespace(0).unwrap();
    let wanted = |name: &str, mode| Wanted {
        size_bytes: Some(8 << 20),
        mode,
        name: name.into(),
        ..Wanted::default()
    };
    for (name, mode) in [("a", Mode::Fsdax), ("b", Mode::Devdax), ("c", Mode::Raw)] {
        region.create_namespace(&wanted(name, mode)).unwrap();
    }
    let names = |region: &Region| -> Vec<_> {
        let all = region.namespaces();
        all.iter()
            .map(|namespace| region.device_name(namespace))
            .collect()
    };
    assert_eq!(names(&region), ["pmem2", "dax2.1", "pmem2.2"]);
    let pmem = region.bind(&map(), 2).unwrap();
    let (region_number, index) = (2, 2);
    let in_use = RegionError::InUse {
        region: region_number,
        index,
    };
    assert_eq!(region.destroy_namespace(2), Err(in_use));
    region.destroy_namespace(1).unwrap();
    drop((pmem, region));
    let region = Region::open(&spec(&text), 2).unwrap();
    assert_eq!(names(&region), ["pmem2", "pmem2.2"]);
    assert!(matches!(
        region.destroy_namespace(9),
        Err(RegionError::Unknown { .. })
    ));
    let big = Wanted {
        size_bytes: Some(1 << 30),
        ..Wanted::default()
    };
    assert!(matches!(
        region.create_namespace(&big),
        Err(RegionError::NoNamespace(_))
    ));
}
