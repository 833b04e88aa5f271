"""Questions in Chinese, Japanese, Korean, Thai, Lao and Khmer are found by their characters."""

from __future__ import annotations

import unicodedata

import pytest

from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.suites.items import Item, renderings


#: Written for this test: question, options, and text around them.
QUESTIONS = {
    "zh": ("下列哪一种气体在地球大气层中所占的比例最大。", ["氧气", "氮气", "二氧化碳", "氩气"]),
    "zh, short": ("世界上面积最大的海洋是哪一个。", ["太平洋", "大西洋", "印度洋", "北冰洋"]),
    "ja": (
        "次のうち、地球の大気中に最も多く含まれている気体はどれですか。",
        ["酸素", "窒素", "二酸化炭素", "アルゴン"],
    ),
    "ko": (
        "다음 중 지구 대기에서 가장 많은 비율을 차지하는 기체는 무엇입니까?",
        ["산소", "질소", "이산화탄소", "아르곤"],
    ),
    "th": ("ก๊าซชนิดใดมีสัดส่วนมากที่สุดในชั้นบรรยากาศของโลก", ["ออกซิเจน", "ไนโตรเจน", "คาร์บอนไดออกไซด์", "อาร์กอน"]),
    "lo": ("ອາຍແກັສຊະນິດໃດມີຫຼາຍທີ່ສຸດໃນຊັ້ນບັນຍາກາດຂອງໂລກ", ["ອົກຊີເຈນ", "ໄນໂຕຣເຈນ"]),
    "km": ("តើឧស្ម័នមួយណាមានច្រើនជាងគេនៅក្នុងបរិយាកាសរបស់ផែនដី", ["អុកស៊ីសែន", "អាសូត"]),
}
AROUND = {
    "zh": "我们昨天去了城里的图书馆、借了几本关于历史和地理的书、然后回家吃了晚饭。",
    "ja": "昨日は町の図書館へ行って歴史や地理の本を何冊か借りてから家に帰って夕食を食べました。",
    "ko": "우리는 어제 시내 도서관에 가서 역사와 지리에 관한 책을 몇 권 빌린 다음 집으로 돌아와 저녁을 먹었다.",
    "th": "เมื่อวานเราไปห้องสมุดในเมืองยืมหนังสือประวัติศาสตร์และภูมิศาสตร์มาหลายเล่มแล้วกลับบ้านไปกินข้าวเย็น",
    "lo": "ມື້ວານນີ້ພວກເຮົາໄປຫໍສະໝຸດໃນເມືອງຢືມປຶ້ມປະຫວັດສາດຫຼາຍຫົວແລ້ວກັບບ້ານໄປກິນເຂົ້າແລງ",
    "km": "ម្សិលមិញយើងបានទៅបណ្ណាល័យក្នុងទីក្រុងខ្ចីសៀវភៅប្រវត្តិសាស្ត្រជាច្រើនក្បាលហើយត្រឡប់មកផ្ទះវិញ",
}


@pytest.fixture(scope="module")
def index() -> NgramIndex:
    items = [Item("quiz", name, renderings(text, options, options[:1])) for name, (text, options) in QUESTIONS.items()]
    return NgramIndex.build(items, short_words=8)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("between", ["\n", ""])
def test_question_is_found_on_its_line_and_inside_text(index: NgramIndex, name: str, form: str, between: str) -> None:
    around, question = AROUND[name[:2]], QUESTIONS[name][0]
    text = unicodedata.normalize(form, f"{around}{between}{question}{between}{around}")
    (hit,) = index.find(text)
    assert index.item(hit.items[0])[1] == name
    found = unicodedata.normalize("NFC", text[hit.start : hit.stop])
    assert found[:-1] in unicodedata.normalize("NFC", question)
    assert len(found) >= 0.9 * len(question)


@pytest.mark.parametrize("name", QUESTIONS)
def test_blanks_inside_a_question_do_not_matter(index: NgramIndex, name: str) -> None:
    question, around = QUESTIONS[name][0], AROUND[name[:2]]
    (hit,) = index.find(f"{around}{' '.join(question)}{around}")
    assert index.item(hit.items[0])[1] == name


@pytest.mark.parametrize("language", AROUND)
def test_other_text_is_not_found(index: NgramIndex, language: str) -> None:
    assert index.search(AROUND[language] * 3) == ([], [])
