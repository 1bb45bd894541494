// SPDX-License-Identifier: Apache-2.0
// What shells are offered after -o is what the formats take.

import DiskFormats
import ImageTool
import Testing

@Suite struct OptionWordsTests {
  /// The refusal of an unknown option names those that there are.
  @Test(arguments: FormatList.all.kinds) func namesAreThoseThatAreTaken(kind: ImageKind) throws {
    let said = try Bench().tool("create", "-f", kind.name, "-o", "unheard-of=1", "disk", "1M")
    let known = (ImageOptions.known(of: kind) + ImageOptions.common).map(\.name).sorted()
    #expect(said.error.hasSuffix(": it has \(known.joined(separator: ", "))\n"), "\(said.error)")
  }

  /// Every value that is offered is taken.
  @Test(arguments: FormatList.all.kinds) func valuesAreTaken(kind: ImageKind) throws {
    let bench = try Bench()
    for (name, values) in ImageOptions.known(of: kind) {
      for value in values {
        // This one needs a file for the data.
        let more = name == "data_file_raw" ? "data_file=data," : ""
        try bench.must(
          "dmu-img", "create", "-q", "-f", kind.name, "-o", "\(more)\(name)=\(value)",
          "\(name)-\(value)", "1M")
      }
    }
  }

  @Test func completions() {
    func words(_ text: String) -> [String] { ImageOptions.completions(of: text, for: .qcow2) }
    #expect(words("").contains("cluster_size="))
    #expect(words("compat=v3,cl").contains("compat=v3,cluster_size="))
    #expect(words("compat=v3,lazy_refcounts=").first == "compat=v3,lazy_refcounts=on")
    #expect(words("nothing=") == [])
    let common = ["backing_file=", "backing_fmt=", "size="]
    #expect(ImageOptions.completions(of: "", for: .qcow) == common)
  }
}
