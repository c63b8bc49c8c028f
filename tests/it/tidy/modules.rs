//! Which module of a crate uses which. Read from the source text: `use` declarations and paths that begin with `crate` or `super`.
//! Modules for tests are left out.
//!
//! Only siblings are compared. A parent and its child may use each other: the child is a part of the parent. A glob (`use super::*`)
//! counts as a use of the module that is named, and not of the modules behind the names that it brings.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// A module's name, one element for each level. The crate's root is the empty name.
pub(super) type Module = Vec<String>;

/// All modules of one crate, and what each of them names.
pub(super) struct Crate {
    files: BTreeMap<Module, File>,
}

#[derive(Default)]
struct File {
    /// Paths that its code names, as written: `["crate", "store", "Store"]`.
    paths: Vec<Vec<String>>,
    /// Names that are declared here with `use`, public or not: the name, and the path behind it. Code elsewhere that takes such a
    /// name from this module really uses the module behind it.
    aliases: BTreeMap<String, Vec<String>>,
    /// Child modules that exist only for tests.
    test_modules: BTreeSet<String>,
}

impl Crate {
    /// Reads a crate from the folder of its root and the files in it. The root is `lib.rs`, or `main.rs` where there is none.
    pub(super) fn read(src: &Path, sources: &[(std::path::PathBuf, String)]) -> Self {
        let mut files = BTreeMap::new();
        let is_library = sources.iter().any(|(path, _)| *path == src.join("lib.rs"));
        for (path, text) in sources {
            let path = path.strip_prefix(src).unwrap().with_extension("");
            let mut module: Module =
                path.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
            let is_other_crate = is_library && module == ["main"] || module[0] == "bin";
            if is_other_crate {
                continue;
            }
            if module == ["lib"] || module == ["main"] || module.last().unwrap() == "mod" {
                module.pop();
            }
            files.insert(module, File::read(text));
        }
        let tests: Vec<Module> = files
            .iter()
            .flat_map(|(module, file)| file.test_modules.iter().map(|name| child(module, name)))
            .collect();
        files.retain(|module, _| !tests.iter().any(|test| module.starts_with(test)));
        Self { files }
    }

    /// Which children of `parent` use which other children of it, with one place for each pair: who names what.
    pub(super) fn uses_below(&self, parent: &[String]) -> BTreeMap<(String, String), String> {
        let child = |module: &[String]| {
            module.starts_with(parent).then(|| module.get(parent.len()).cloned()).flatten()
        };
        let mut uses = BTreeMap::new();
        for (module, file) in &self.files {
            let Some(from) = child(module) else { continue };
            for path in &file.paths {
                let target = self.target(module, path, 0);
                let to = target.as_deref().and_then(child).filter(|to| *to != from);
                if let Some(to) = to {
                    let place = format!("{} names {}", module.join("::"), path.join("::"));
                    uses.entry((from.clone(), to)).or_insert(place);
                }
            }
        }
        uses
    }

    /// All modules that have children.
    pub(super) fn parents(&self) -> BTreeSet<Module> {
        let parent =
            |module: &Module| module.split_last().map(|(_, parent)| parent.to_vec()).into_iter();
        self.files.keys().flat_map(parent).collect()
    }

    /// The module that a path leads to, written in `from`. `None`: another crate.
    fn target(&self, from: &[String], path: &[String], depth: usize) -> Option<Module> {
        let mut module = match path[0].as_str() {
            "crate" => Vec::new(),
            "self" | "super" => from.to_vec(),
            name => self.files.contains_key(&child(from, name)).then(|| from.to_vec())?,
        };
        let begins = usize::from(matches!(path[0].as_str(), "crate" | "self"));
        for name in &path[begins..] {
            if name == "super" {
                module.pop();
                continue;
            }
            module.push(name.clone());
            if self.files.contains_key(&module) {
                continue;
            }
            module.pop();
            // An item, or a name that was declared there for something that is elsewhere.
            let alias = self.files.get(&module).and_then(|file| file.aliases.get(name));
            return match alias {
                Some(path) if depth < 8 => {
                    Some(self.target(&module, path, depth + 1).unwrap_or(module))
                }
                _ => Some(module),
            };
        }
        Some(module)
    }
}

impl File {
    fn read(text: &str) -> Self {
        let mut file = Self::default();
        let tokens = tokens(text);
        let mut at = 0;
        while at < tokens.len() {
            match &tokens[at..] {
                [a, b, c, d, e, f, g, ..]
                    if [a, b, c, d, e, f, g] == ["#", "[", "cfg", "(", "test", ")", "]"] =>
                {
                    at = file.skip_for_tests(&tokens, at + 7);
                }
                [word, ..] if word == "use" => {
                    let end = at + tokens[at..].iter().position(|token| token == ";").unwrap();
                    file.read_use(&[], &tokens[at + 1..end]);
                    at = end;
                }
                [root, colons, ..] if (root == "crate" || root == "super") && colons == "::" => {
                    let mut path = vec![root.clone()];
                    while let [colons, name, ..] = &tokens[at + 1..] {
                        if colons != "::" || !is_name(name) {
                            break;
                        }
                        path.push(name.clone());
                        at += 2;
                    }
                    file.paths.push(path);
                    at += 1;
                }
                _ => at += 1,
            }
        }
        file
    }

    /// Leaves out the item that stands behind `#[cfg(test)]`.
    fn skip_for_tests(&mut self, tokens: &[String], from: usize) -> usize {
        let mut depth = 0;
        for (n, token) in tokens.iter().enumerate().skip(from) {
            if token == "mod" && depth == 0 {
                self.test_modules.insert(tokens[n + 1].clone());
            }
            match token.as_str() {
                "{" | "(" | "[" => depth += 1,
                "}" if depth == 1 => return n + 1,
                "}" | ")" | "]" => depth -= 1,
                ";" if depth == 0 => return n + 1,
                _ => {}
            }
        }
        tokens.len()
    }

    /// Reads one tree of a `use` declaration: `a::{b, c as d}`.
    fn read_use(&mut self, before: &[String], tree: &[String]) {
        let mut path = before.to_vec();
        let mut rest = tree;
        while let [name, colons, ..] = rest {
            if colons != "::" {
                break;
            }
            path.push(name.clone());
            rest = &rest[2..];
        }
        match rest {
            [open, inner @ .., _close] if open == "{" => {
                let (mut depth, mut begin) = (0, 0);
                for (n, token) in inner.iter().enumerate() {
                    match token.as_str() {
                        "{" => depth += 1,
                        "}" => depth -= 1,
                        "," if depth == 0 => {
                            self.read_use(&path, &inner[begin..n]);
                            begin = n + 1;
                        }
                        _ => {}
                    }
                }
                if begin < inner.len() {
                    self.read_use(&path, &inner[begin..]);
                }
            }
            [name, renamed @ ..] => {
                if name != "self" && name != "*" {
                    path.push(name.clone());
                }
                let alias = renamed.last().or(path.last()).cloned();
                if let Some(alias) = alias.filter(|alias| is_name(alias)) {
                    self.aliases.insert(alias, path.clone());
                }
                if !path.is_empty() {
                    self.paths.push(path);
                }
            }
            [] => {}
        }
    }
}

fn child(parent: &[String], name: &str) -> Module {
    let mut child = parent.to_vec();
    child.push(name.to_owned());
    child
}

fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphanumeric() || c == '_')
}

/// Names and signs of Rust code, without comments and texts. `::` is one sign.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            3 + raw.find("\"#").map_or(raw.len(), |end| end + 2)
        } else if first == '"' {
            text_length(rest)
        } else if first == '\'' {
            character_length(rest)
        } else if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            tokens.push(rest[..end].to_owned());
            end
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

/// How long the text is that `rest` begins with.
fn text_length(rest: &str) -> usize {
    let mut escaped = false;
    for (n, c) in rest.char_indices().skip(1) {
        match c {
            '"' if !escaped => return n + 1,
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    rest.len()
}

/// How long the character is that `rest` begins with. A lifetime is only its sign.
fn character_length(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    match (characters.next(), characters.next()) {
        (Some((_, '\\')), Some((n, escaped))) => {
            let behind = n + escaped.len_utf8();
            behind + rest[behind..].find('\'').map_or(0, |end| end + 1)
        }
        (Some(_), Some((n, '\''))) => n + 1,
        _ => 1,
    }
}

/// Groups of modules that use each other, directly or by way of others.
pub(super) fn circles(uses: &BTreeMap<(String, String), String>) -> Vec<BTreeSet<String>> {
    let reached = |from: &str| {
        let mut reached = BTreeSet::new();
        let mut next = vec![from.to_owned()];
        while let Some(module) = next.pop() {
            for (_, to) in uses.keys().filter(|(from, _)| *from == module) {
                if reached.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        reached
    };
    let all: BTreeMap<&String, BTreeSet<String>> =
        uses.keys().map(|(from, _)| (from, reached(from))).collect();
    let mut circles: Vec<BTreeSet<String>> = Vec::new();
    for (module, reached) in all.iter().filter(|(module, reached)| reached.contains(**module)) {
        let circle: BTreeSet<_> = reached
            .iter()
            .filter(|other| all.get(other).is_some_and(|back| back.contains(*module)))
            .cloned()
            .collect();
        if !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}

#[test]
fn the_reader_finds_what_is_named() {
    let text = r##"
        //! use crate::comment::Nothing;
        use std::fmt;
        pub(crate) use self::model::{Model, sub::{Deep as D, self}};
        use crate::{store::{Store, *}, clock};
        #[cfg(test)]
        mod tests { use crate::only_for_tests::X; }
        #[cfg(test)]
        pub(super) mod fixture;
        fn f<'a>(x: &'a str) -> char { let _ = "crate::text::X \" "; super::super::other::f('"', '\''); crate::a::b!() }
    "##;
    let file = File::read(text);
    let paths: Vec<_> = file.paths.iter().map(|path| path.join("::")).collect();
    assert_eq!(
        paths,
        [
            "std::fmt",
            "self::model::Model",
            "self::model::sub::Deep",
            "self::model::sub",
            "crate::store::Store",
            "crate::store",
            "crate::clock",
            "super::super::other::f",
            "crate::a::b"
        ]
    );
    assert_eq!(file.aliases["D"].join("::"), "self::model::sub::Deep");
    assert_eq!(file.test_modules.into_iter().collect::<Vec<_>>(), ["fixture", "tests"]);
}

#[test]
fn a_circle_is_found_also_behind_a_name_that_the_parent_lends() {
    let src = Path::new("/src");
    let file = |name: &str, text: &str| (src.join(name), text.to_owned());
    let read = |files: &[_]| Crate::read(src, files);
    let with = |last: &str| {
        let krate = read(&[
            file("lib.rs", "mod a; mod b; mod c; pub use c::Thing;"),
            file("a.rs", "use crate::b::B;"),
            file("b.rs", "use crate::Thing;"),
            file("c.rs", last),
        ]);
        circles(&krate.uses_below(&[]))
    };
    assert!(with("pub struct Thing;").is_empty());
    let circle: BTreeSet<_> = ["a", "b", "c"].map(str::to_owned).into();
    assert_eq!(with("use crate::a::A; pub struct Thing;"), [circle]);
}
